"""What each mode puts in the place of a head's output, made by hand from runs of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.sweeps.modes import Ablator, Mode
from attnlens.sweeps.run import run_trials
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task
from tests.sweeps.naive import assert_close, lens_of, task_of

D = 8  # of a head of the catalogue's GPT-2, which has 3 layers of 4 heads
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def lens() -> Lens:
    return lens_of("gpt2")


@pytest.fixture(scope="module")
def task(lens: Lens) -> Task:
    return task_of(lens, (14, 9, 12))


def attention(lens: Lens, layer: int) -> Any:
    model: Any = lens.model
    return model.transformer.h[layer].attn


def by_hand(lens: Lens, ids: Tensor, z: dict[int, Change]) -> Tensor:
    """Logits with the input of some layers' output projection changed; right padding is no input.

    No prompt sees what comes after it, so the padding needs no mask.
    """
    with ExitStack() as stack, torch.no_grad():
        for layer, change in z.items():

            def hook(_: nn.Module, args: tuple[Tensor], own: Change = change) -> tuple[Tensor]:
                return (own(args[0].clone()),)

            handle = attention(lens, layer).c_proj.register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        return lens.model(input_ids=ids).logits


def z_of(lens: Lens, ids: Tensor) -> list[Tensor]:
    """What the output projection of each layer is given."""
    found: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        for layer in range(3):
            projection = attention(lens, layer).c_proj
            handle = projection.register_forward_hook(lambda _, args, __: found.append(args[0]))
            stack.callback(handle.remove)
        lens.model(input_ids=ids)
    return found


def values_of(lens: Lens, task: Task, mode: str, spec: str, **given: Any) -> Tensor:
    ablator = Ablator.of(lens, task, mode, **given)
    return run_trials(lens, task, [ablator.trial(lens.anatomy.find(spec))]).values[0]


def graded(task: Task, logits: Tensor) -> Tensor:
    return task.score(task.at_reads(logits))


def put(heads: Sequence[int], tensor: Tensor | float) -> Change:
    """z with those of some heads replaced by others, a tensor of all heads' or a number."""

    def change(z: Tensor) -> Tensor:
        for head in heads:
            own = slice(head * D, (head + 1) * D)
            z[..., own] = tensor[..., own] if isinstance(tensor, Tensor) else tensor
        return z

    return change


def test_resampling_is_patching_from_the_corrupt_run(lens: Lens, task: Task) -> None:
    theirs = z_of(lens, task.corrupt)
    found = values_of(lens, task, "resample", "L0H1,L2H3")
    logits = by_hand(lens, task.clean, {0: put([1], theirs[0]), 2: put([3], theirs[2])})
    assert_close(found, graded(task, logits), 1e-10)
    whole = values_of(lens, task, "resample", "L2")
    logits = by_hand(lens, task.clean, {2: put(range(4), theirs[2])})
    assert_close(whole, graded(task, logits), 1e-10)


@pytest.mark.parametrize("position", [0, 5, -1])
def test_resampling_at_a_position(lens: Lens, task: Task, position: int) -> None:
    theirs = z_of(lens, task.corrupt)[1]
    lengths = task.mask.sum(1)
    rows = torch.where(torch.tensor(position) < 0, lengths + position, position)

    def change(z: Tensor) -> Tensor:
        for prompt, row in enumerate(rows.tolist()):
            z[prompt, row, 16:24] = theirs[prompt, row, 16:24]
        return z

    trial = Ablator.of(lens, task, "resample").trial([lens.anatomy["L1"].head(2)], None, position)
    found = run_trials(lens, task, [trial]).values[0]
    assert_close(found, graded(task, by_hand(lens, task.clean, {1: change})), 1e-10)


def test_means_are_those_of_the_corrupt_prompts(lens: Lens, task: Task) -> None:
    theirs = z_of(lens, task.corrupt)[1]
    mean = theirs[task.mask].mean(0)
    found = values_of(lens, task, "mean", "L1H0,L1H3")
    assert_close(found, graded(task, by_hand(lens, task.clean, {1: put([0, 3], mean)})), 1e-10)
    real = task.mask[..., None].double()
    there = (theirs * real).sum(0) / real.sum(0).clamp(min=1)
    found = values_of(lens, task, "position_mean", "L1H0")
    assert_close(found, graded(task, by_hand(lens, task.clean, {1: put([0], there)})), 1e-10)


def test_frozen_is_zero_with_the_dense_maps_of_the_clean_run(lens: Lens, task: Task) -> None:
    """Two runs: the clean one gives A of later layers, in the other z is A times its values."""
    maps = lens.run(task.clean_inputs(), keep="pattern").pattern
    values: dict[int, Tensor] = {}

    def keep_values(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
            values[layer] = output[..., 64:].unflatten(-1, (4, D)).transpose(1, 2)

        return hook

    def as_before(layer: int) -> Change:
        return lambda z: (maps[layer] @ values[layer]).transpose(1, 2).reshape(z.shape)

    with ExitStack() as stack:
        for layer in (1, 2):
            module = attention(lens, layer).c_attn
            stack.callback(module.register_forward_hook(keep_values(layer)).remove)
        logits = by_hand(lens, task.clean, {0: put([1, 2], 0.0), 1: as_before(1), 2: as_before(2)})
    wanted = graded(task, logits)
    found = values_of(lens, task, "frozen", "L0H1,L0H2")
    assert_close(found, wanted, 1e-9)
    assert (found - values_of(lens, task, "zero", "L0H1,L0H2")).abs().max() > 1e-3


def test_frozen_heads_of_several_layers_write_nothing_and_attend_as_before(
    lens: Lens, task: Task
) -> None:
    """Of the last layer's heads there is no later map: frozen is zero there."""
    last = values_of(lens, task, "frozen", "L2H1")
    assert torch.equal(last, values_of(lens, task, "zero", "L2H1"))
    both = values_of(lens, task, "frozen", "L1H0,L2H1")
    assert (both - values_of(lens, task, "zero", "L1H0,L2H1")).abs().max() > 1e-4


def test_every_mode_moves_the_metric_in_its_own_way(lens: Lens, task: Task) -> None:
    found = [values_of(lens, task, mode, "L0H1") for mode in Mode]
    for one in range(len(found)):
        for other in range(one):
            assert (found[one] - found[other]).abs().max() > 1e-4


def test_parts_of_the_prompts_get_their_own_runs(lens: Lens, task: Task) -> None:
    """Donors are of the prompts whose turn it is."""
    for mode in (Mode.RESAMPLE, Mode.FROZEN):
        trials = [Ablator.of(lens, task, mode).trial([lens.anatomy["L0"].head(1)])]
        whole = run_trials(lens, task, trials)
        alone = run_trials(lens, task, trials, settings=SweepSettings(batch_size=1))
        assert_close(alone.values, whole.values, 1e-10)


def test_a_trial_says_what_it_is(lens: Lens, task: Task) -> None:
    heads = lens.anatomy.find("L0H1,L2H3")
    trial = Ablator.of(lens, task, "identity").trial(heads, position=4)
    assert trial.name == "L0H1,L2H3"
    assert trial.describe() == {"mode": "identity", "heads": "L0H1,L2H3", "position": "4"}
    references = [None, [[5, 6, 7]], [[5, 6, 8]], task.clean_inputs()]
    told = [
        Ablator.of(lens, task, "mean", reference).trial(heads).describe().get("reference")
        for reference in references
    ]
    assert told[0] is None
    assert len(set(told)) == 4
    again = Ablator.of(lens, task, "mean", [[5, 6, 7]]).trial(heads).describe()
    assert again["reference"] == told[1]


def test_a_reference_is_refused_where_it_is_not_used(lens: Lens, task: Task) -> None:
    with pytest.raises(InputError, match="zero takes no reference"):
        Ablator.of(lens, task, "zero", [[1, 2]])
    with pytest.raises(InputError, match="choose zero, mean"):
        Ablator.of(lens, task, "nothing")
