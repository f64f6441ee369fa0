"""Runs with edges cut that go on from the first cut are full runs; references and directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.edge_runs import EdgeAblation, EdgeRuns, directed, mean_written
from attnlens.anatomy import Site
from attnlens.errors import InputError
from attnlens.hooks.edge_run import Listen
from attnlens.lens import Lens
from attnlens.tasks import Task
from tests.architectures import ARCHITECTURES

NAMES = ["gpt2", "opt", "llama", "phi", "gpt_neox", "persimmon", "mixtral", "qwen3", "t5", "mbart"]


def lens_of(name: str) -> Lens:
    return al.load(ARCHITECTURES[name].build().double())


def task_of(lens: Lens, lengths: tuple[int, ...] = (9, 9)) -> Task:
    draw = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 90, (count,), generator=draw).tolist()

    clean, corrupt = ([ids(length) for length in lengths] for _ in range(2))
    # The decoder of an encoder-decoder reads its start token alone.
    last = [[0] if len(lens.anatomy.stacks) > 1 else [length - 1] for length in lengths]
    return Task.from_prompts("random", clean, corrupt, last, [[5]] * len(last), [[6]] * len(last))


def some_choices(lens: Lens) -> list[Tensor]:
    """Without one edge into the logits, into an MLP, into a late and an early head; many cut."""
    network = lens.wiring.network
    found: list[Tensor] = []
    for kind in ("logits", "mlp", "v", "q"):
        own = [n for n, receiver in enumerate(network.receivers) if receiver.kind == kind]
        for column in (own[-1], own[0]):
            kept = network.exists.clone()
            kept[network.exists[:, column].nonzero()[-1], column] = False
            found.append(kept)
    draw = torch.Generator().manual_seed(1)
    found += [network.exists & (torch.rand(network.exists.shape, generator=draw) < 0.5)]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_the_first_cut_is_a_full_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = lens_of(name)
    runs = EdgeRuns(lens, task_of(lens))
    choices = some_choices(lens)
    found = torch.cat([runs.run([kept]) for kept in choices])
    starts = {runs._first_cut(kept[None]) for kept in choices}
    assert len(starts) > 1
    monkeypatch.setattr(runs, "_first_cut", lambda kept: None)
    wanted = torch.cat([runs.run([kept]) for kept in choices])
    together = runs.run(choices)
    # float64, but for norms and routers that some models compute in float32
    assert torch.allclose(found, wanted, atol=1e-6, rtol=0)
    assert torch.allclose(together, wanted, atol=1e-6, rtol=0)
    assert (wanted - runs.full).abs().max() > 1e-3


def test_the_last_site_is_where_cut_logits_go_on() -> None:
    lens = lens_of("gpt2")
    runs = EdgeRuns(lens, task_of(lens))
    network = lens.wiring.network
    kept = network.exists.clone()
    kept[:, -1] = False
    assert runs._first_cut(kept[None]) == lens.anatomy.sites[-1]
    assert runs._first_cut(torch.zeros_like(kept)[None]) == lens.anatomy.sites[0]
    middle = network.exists.clone()
    middle[0, [r.name for r in network.receivers].index("L1.mlp")] = False
    start = runs._first_cut(middle[None])
    assert isinstance(start, Site)
    assert start.name == "L1"


def test_prompts_of_two_lengths_are_those_alone() -> None:
    lens = lens_of("llama")
    task = task_of(lens, (12, 7, 9))
    choices = some_choices(lens)
    together = EdgeRuns(lens, task).run(choices)
    alone = [EdgeRuns(lens, task.subset([n])).run(choices) for n in range(3)]
    small = EdgeRuns(lens, task, batch_size=2).run(choices)
    assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-6, rtol=0)
    assert torch.allclose(together, small, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ablation", list(EdgeAblation))
def test_all_edges_are_the_model_whatever_the_reference(ablation: EdgeAblation) -> None:
    lens = lens_of("phi")
    task = task_of(lens, (9, 6))
    runs = EdgeRuns(lens, task, ablation=ablation)
    whole, none = runs.run([runs.network.exists, torch.zeros_like(runs.network.exists)])
    clean = task.score(lens.logits(task.clean_inputs(), task.reads))
    assert torch.allclose(runs.full, clean, atol=1e-10, rtol=0)
    assert torch.allclose(whole, clean, atol=1e-10, rtol=0)
    if ablation is EdgeAblation.RESAMPLE:
        corrupt = task.score(lens.logits(task.corrupt_inputs(), task.reads))
        assert torch.allclose(none, corrupt, atol=1e-10, rtol=0)


def test_means_are_over_real_positions() -> None:
    lens = lens_of("gpt2")
    task = task_of(lens, (9, 5))
    found = mean_written(lens, task.corrupt_inputs(), batch_size=1)
    total: dict[str, Tensor] = {}
    for ids, mask in zip(task.corrupt, task.mask, strict=True):
        listen = Listen(lens.wiring)
        lens.observe(lens.encode(ids[mask][None]), listen)
        for name, written in listen.written.items():
            total[name] = total.get(name, torch.zeros(1)) + written[0].sum(0)
    for name, mean in found.items():
        assert torch.allclose(mean, total[name] / 14, atol=1e-10, rtol=0)


def test_refusals() -> None:
    lens = lens_of("gpt2")
    task = task_of(lens)
    with pytest.raises(InputError, match="choose resample, mean, zero"):
        EdgeRuns(lens, task, ablation="noise")
    with pytest.raises(InputError, match="takes no reference"):
        EdgeRuns(lens, task, ablation="zero", reference=[[5, 6]])
    with pytest.raises(InputError, match="1 or more"):
        EdgeRuns(lens, task, batch_size=0)
    with pytest.raises(InputError, match="noise or denoise"):
        directed(task, "both", EdgeAblation.RESAMPLE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="none to put"):
        directed(task, "denoise", EdgeAblation.ZERO)
    with pytest.raises(InputError, match="leave the block"), lens.edit(al.Zero("L0H0")):
        EdgeRuns(lens, task)
