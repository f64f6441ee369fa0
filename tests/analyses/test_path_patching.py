"""Path patching: circuits whose edges are known, and a slow oracle of plain hooks."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import attnlens as al
from attnlens.analyses.path_patching import PathEffects
from attnlens.analyses.stored import stored_ablation
from attnlens.errors import FileError, HeadError, InputError, UnsupportedModelError
from attnlens.lens import Lens
from attnlens.sweeps.at_reads import at_reads
from attnlens.sweeps.clean_run import CleanRun
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task, repeated_tokens
from attnlens.tasks.other_name import other_name
from attnlens.zoo import induction_model, name_circuit, name_model
from tests.analyses.conftest import tiny_gpt2
from tests.oracles import path_patching as oracle
from tests.oracles import paths
from tests.sweeps.naive import assert_close, lens_of, task_of

ONE_BY_ONE = SweepSettings(tokens=1, restart=False)


def tiny_llama() -> LlamaForCausalLM:
    """A random float64 Llama of 3 layers, 4 heads in 2 groups."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(8)
    return model


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lens(request: pytest.FixtureRequest) -> Lens:
    return al.load(tiny_gpt2() if request.param == "gpt2" else tiny_llama())


@pytest.fixture(scope="module")
def task() -> Task:
    """Three prompts of different lengths, each read in two places, whose twins begin alike."""
    return random_task()


def random_task(lengths: tuple[int, ...] = (12, 8, 11), same: int = 2) -> Task:
    draw = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 40, (count,), generator=draw).tolist()

    clean = [ids(length) for length in lengths]
    corrupt = [[*own[:same], *ids(len(own) - same)] for own in clean]
    reads = [[length - 3, length - 1] for length in lengths]
    answers, wrong = ([ids(2) for _ in lengths] for _ in range(2))
    return Task.from_prompts("random", clean, corrupt, reads, answers, wrong)


def by_hooks(
    lens: Lens, task: Task, sender: str, receivers: list[oracle.Receiver] | None
) -> Tensor:
    own, other = task.clean_inputs(), task.corrupt_inputs()
    logits = oracle.path_logits(lens.model, own, other, sender, receivers)
    return task.score(task.at_reads(logits)).double()


def of(found: PathEffects, sender: str) -> Tensor:
    return found.patched[found.senders.index(sender)]


def others(sender: str, receivers: list[oracle.Receiver] | None) -> list[oracle.Receiver] | None:
    """Receivers but the sender itself, whose input is what it is whatever it sends."""
    return receivers and [own for own in receivers if (sender, own) != ("L1.mlp", (1, -1, "mlp"))]


SENDERS = ["embed", "L0H1", "L0.mlp", "L1H3", "L1.mlp"]


@pytest.mark.parametrize(
    ("named", "receivers"),
    [
        ("logits", None),
        ("L2H1<q>", [(2, 1, "q")]),
        ("L2H2<k>", [(2, 2, "k")]),
        ("L2H0<v>", [(2, 0, "v")]),
        ("L2H3", [(2, 3, "q"), (2, 3, "k"), (2, 3, "v")]),
        ("L1.mlp", [(1, -1, "mlp")]),
        ("L2.mlp", [(2, -1, "mlp")]),
        ("L1H0<q>,L2H2<v>,L1.mlp", [(1, 0, "q"), (2, 2, "v"), (1, -1, "mlp")]),
    ],
)
def test_is_what_plain_hooks_do(
    lens: Lens, task: Task, named: str, receivers: list[oracle.Receiver] | None
) -> None:
    found = al.path_patch(lens, task, named, SENDERS)
    assert found.receivers == tuple(named.split(","))
    wanted = torch.stack([by_hooks(lens, task, s, others(s, receivers)) for s in SENDERS])
    torch.testing.assert_close(found.patched, wanted, rtol=1e-10, atol=1e-10)
    reaches = found.effect.abs() > 1e-9
    assert reaches[0]  # embed reaches every receiver
    assert reaches.sum() >= 2


@pytest.mark.parametrize("named", ["logits", "L1H0<q>,L2H2<k>", "L2.mlp", "L0H1<v>,L2H0"])
def test_side_by_side_is_one_by_one(lens: Lens, task: Task, named: str) -> None:
    senders = ["embed", "all", "L0.mlp", "L1.mlp"]
    together = al.path_patch(lens, task, named, senders)
    alone = al.path_patch(lens, task, named, senders, sweep=ONE_BY_ONE)
    assert together.senders == alone.senders
    torch.testing.assert_close(together.patched, alone.patched, rtol=1e-10, atol=1e-10)
    apart = al.path_patch(lens, task, named, senders, sweep=SweepSettings(batch_size=2, tokens=60))
    torch.testing.assert_close(together.patched, apart.patched, rtol=1e-10, atol=1e-10)


def test_padding_does_not_count(lens: Lens, task: Task) -> None:
    together = al.path_patch(lens, task, "L2H1<k>", "L0,L1")
    logits = al.path_patch(lens, task, "logits", "L0,L1")
    for number in range(len(task)):
        one = task.subset([number])
        length = int(one.mask.sum())
        cut = {name: getattr(one, name)[:, :length] for name in ("clean", "corrupt", "mask")}
        for whole, receivers in ((together, "L2H1<k>"), (logits, "logits")):
            alone = al.path_patch(lens, replace(one, **cut), receivers, "L0,L1")
            wanted = whole.patched[:, number]
            torch.testing.assert_close(alone.patched[:, 0], wanted, rtol=1e-10, atol=1e-10)


def test_a_prefix_that_both_runs_share_need_not_run_again(lens: Lens) -> None:
    task = random_task((16, 15, 16), same=10)
    for receivers in ("L2H1<k>", "L1H0,L2.mlp"):
        found = al.path_patch(lens, task, receivers, ["L0", "L1", "embed"])
        alone = al.path_patch(lens, task, receivers, ["L0", "L1", "embed"], sweep=ONE_BY_ONE)
        torch.testing.assert_close(found.patched, alone.patched, rtol=1e-10, atol=1e-10)


def test_denoise_is_noise_the_other_way_round(lens: Lens, task: Task) -> None:
    turned = replace(task, clean=task.corrupt, corrupt=task.clean)
    for receivers in ("logits", "L2H1<v>"):
        found = al.path_patch(lens, task, receivers, "L0,embed", direction="denoise")
        other = al.path_patch(lens, turned, receivers, "L0,embed")
        assert found.patched.equal(other.patched)
        assert found.effect.equal(other.effect)
        assert found.share.equal(other.share)
        assert found.direction == "denoise"
        noise = al.path_patch(lens, task, receivers, "L0,embed")
        torch.testing.assert_close(found.clean, noise.clean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.corrupt, noise.corrupt, rtol=1e-10, atol=1e-10)
        gap = (found.clean - found.corrupt).mean()
        torch.testing.assert_close(found.share, found.effect / gap)


def test_the_other_run_is_the_model_on_the_other_prompts(lens: Lens, task: Task) -> None:
    found = al.path_patch(lens, task, "logits", "L0H0")
    wanted = task.score(lens.logits(task.corrupt_inputs(), task.reads)).double()
    torch.testing.assert_close(found.corrupt, wanted, rtol=1e-10, atol=1e-10)


def test_without_a_gap_there_is_no_share(lens: Lens, task: Task) -> None:
    found = al.path_patch(lens, replace(task, corrupt=task.clean), "logits", "L0H0")
    assert found.effect.abs().max() < 1e-12
    assert found.share.isnan().all()
    assert any("No shares" in note for note in found.notes)


def test_only_one_path_carries_induction() -> None:
    lens = al.load(induction_model().double())
    task = repeated_tokens(lens, prompts=4, period=8)
    found = {
        kind: al.path_patch(lens, task, f"L1H2<{kind}>", "L0", metric="logit_difference")
        for kind in "qkv"
    }
    for kind, result in found.items():
        others = [s for s in result.senders if (s, kind) != ("L0H1", "k")]
        assert len(others) == 4 - (kind == "k")
        for sender in others:
            assert (of(result, sender) - result.clean).abs().max() < 1e-11
    # Without its key L1H2 looks at START, or where the corrupt prompt's token stands.
    assert -20 < found["k"].effect[1] < -12
    both = al.path_patch(lens, task, "L1H2", "L0", metric="logit_difference")
    torch.testing.assert_close(both.patched, found["k"].patched, rtol=0, atol=1e-10)


def test_the_edges_of_the_name_circuit_and_no_others() -> None:
    lens = al.load(name_model().double())
    task = other_name(lens, prompts=3, length=12)
    _, known = paths.run(lens.model, task.clean)
    _, other = paths.run(lens.model, task.corrupt)
    edges = set(name_circuit())
    for receiver in ["logits", *map(str, lens.anatomy.heads)]:
        for kind in [""] if receiver == "logits" else "qkv":
            named = f"{receiver}<{kind}>" if kind else receiver
            found = al.path_patch(lens, task, named, ["embed", "all"])
            for sender in found.senders:
                edge = sender, receiver, kind
                change = of(found, sender) - found.clean
                if edge in edges:
                    assert change.max() < -2, edge
                    logits, _ = paths.run(lens.model, task.clean, edge, other, known=known)
                    wanted = task.score(task.at_reads(logits))
                    torch.testing.assert_close(of(found, sender), wanted, rtol=0, atol=1e-10)
                else:
                    assert change.abs().max() < 1e-10, edge


@pytest.mark.parametrize(
    "name",
    ["opt", "gpt_neox", "mistral", "gemma3_text", "cohere", "olmo2", "deepseek_v3", "diffllama",
     "longcat_flash", "gpt_oss", "jamba", "zamba2", "bert", "albert", "t5", "bart"],
)  # fmt: skip
def test_every_architecture_side_by_side_is_one_by_one(name: str) -> None:
    lens = lens_of(name)
    task = task_of(lens)
    last = lens.anatomy.sites[-1]
    for receivers in ("logits", f"{last.head(1)}<q>,{last.head(0)}<v>"):
        found = al.path_patch(lens, task, receivers)
        alone = al.path_patch(lens, task, receivers, sweep=ONE_BY_ONE)
        assert_close(found.patched, alone.patched, 1e-9)
        wanted = task.score(lens.logits(task.corrupt_inputs(), task.reads)).double()
        if bool(found.corrupt.isnan().all()):
            # Blocks that are given embeddings beside the stream, or that have two layers in one.
            assert name in ("zamba2", "longcat_flash")
        else:
            assert_close(found.corrupt, wanted, 1e-9)


def gated() -> Qwen3NextForCausalLM:
    """A random float64 model that gates z by the stream before its output projection."""
    layers = 3
    config = Qwen3NextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        layer_types=["full_attention"] * layers, mlp_only_layers=[*range(layers)],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3NextForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(8)
    return model


@pytest.mark.parametrize("receivers", ["logits", "L2H1<q>"])
def test_what_gates_a_head_is_computed_anew(receivers: str) -> None:
    lens = al.load(gated())
    task = task_of(lens)
    assert all(site.output is None for site in lens.anatomy.sites)
    found = al.path_patch(lens, task, receivers, "L0,embed")
    alone = al.path_patch(lens, task, receivers, "L0,embed", sweep=ONE_BY_ONE)
    assert_close(found.patched, alone.patched, 1e-9)


def test_the_logits_are_reached_at_the_rows_read_alone(lens: Lens, task: Task) -> None:
    clean = CleanRun.of(lens, task, "loss")
    short = at_reads(clean)
    assert short is not None
    assert short.tokens == 6
    assert clean.tokens == 36


def test_a_model_that_mixes_positions_elsewhere_runs_all_rows() -> None:
    lens = lens_of("jamba")
    assert at_reads(CleanRun.of(lens, task_of(lens), "loss")) is None


def test_what_is_below_no_receiver_has_no_effect(lens: Lens, task: Task) -> None:
    found = al.path_patch(lens, task, "L1H1", ["L2H0", "L0H1", "L1H0", "L1.mlp"])
    assert found.senders == ("L2H0", "L0H1", "L1H0", "L1.mlp")
    assert (found.effect[[0, 2, 3]] == 0).all()
    assert found.effect[1] != 0
    assert any("L2H0, L1H0, L1.mlp" in note for note in found.notes)


def test_grouped_keys_are_received_together(task: Task) -> None:
    lens = al.load(tiny_llama())
    found = al.path_patch(lens, task, "L2H2<k>", "L0")
    assert any("L2H3 read the same k" in note for note in found.notes)
    twin = al.path_patch(lens, task, "L2H3<k>", "L0")
    assert found.patched.equal(twin.patched)
    both = al.path_patch(lens, task, ["L2H2<k>", "L2H3<k>"], "L0")
    assert not any("the same k" in note for note in both.notes)
    torch.testing.assert_close(both.patched, found.patched, rtol=1e-12, atol=1e-12)


def test_named_ends() -> None:
    lens = al.load(tiny_gpt2())
    task = random_task()
    one = al.path_patch(lens, task, [(2, 1), "L1H0<q>"], (0, 3))
    other = al.path_patch(lens, task, "L2H1, L1H0<q>", "L0H3")
    assert one.receivers == other.receivers == ("L2H1", "L1H0<q>")
    assert one.senders == other.senders == ("L0H3",)
    assert one.patched.equal(other.patched)
    layer = al.path_patch(lens, task, "L2<v>", "L0:2")
    assert layer.receivers == ("L2H0<v>", "L2H1<v>", "L2H2<v>", "L2H3<v>")
    assert len(layer.senders) == 8
    frame = layer.to_frame()
    assert frame["sender"].tolist() == list(layer.senders)
    assert frame["effect"].tolist() == layer.effect.tolist()
    assert (layer.low <= layer.effect).all()
    assert (layer.effect <= layer.high).all()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"receivers": "L0H1"}, "No sender stands below"),
        ({"receivers": "embed"}, "receives nothing"),
        ({"receivers": "logits,L1H1"}, "logits alone"),
        ({"receivers": "L1H1<z>"}, "L3H5<k>"),
        ({"receivers": []}, "needs ends"),
        ({"senders": "logits"}, "sends nothing"),
        ({"senders": "L0H1<q>"}, "sends nothing"),
        ({"senders": "enc.embed"}, "has no enc.embed; there is embed"),
        ({"form": "direct paths"}, "choose frozen"),
        ({"direction": "up"}, "noise or denoise"),
        ({"resamples": 0}, "bootstrap"),
    ],
)
def test_refusals(random_lens: Lens, task: Task, named: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        al.path_patch(random_lens, task, **named)


def test_heads_and_mlps_that_are_not_there(random_lens: Lens, task: Task) -> None:
    for named in ("L9H0", "L1H9<k>", "L9.mlp", "nonsense"):
        with pytest.raises(HeadError, match=r"has L0\.\.2 with 4 heads"):
            al.path_patch(random_lens, task, named)
    silent = al.load(name_model())
    with pytest.raises(UnsupportedModelError, match="No MLP was found at L1"):
        al.path_patch(silent, other_name(silent, prompts=2), "L1.mlp")


@pytest.mark.parametrize("receivers", ["logits", "L2H1<k>,L1.mlp"])
def test_a_stored_sweep_goes_on_and_is_read_again(
    lens: Lens, task: Task, tmp_path: Path, receivers: str
) -> None:
    wanted = al.path_patch(lens, task, receivers, "L0,embed,L2H0")
    folder = tmp_path / "paths"
    sweep = SweepSettings(store=folder, batch_size=1)

    class StopError(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done > 8:
            raise StopError

    with pytest.raises(StopError):
        al.path_patch(lens, task, receivers, "L0,embed,L2H0", sweep=sweep, progress=stop)
    half = stored_ablation(folder)
    assert isinstance(half, PathEffects)
    assert half.patched.isnan().any()
    assert any("Not finished" in note for note in half.notes)
    resumed = replace(sweep, resume=True)
    found = al.path_patch(lens, task, receivers, "L0,embed,L2H0", sweep=resumed)
    torch.testing.assert_close(found.patched, wanted.patched, rtol=1e-10, atol=1e-10)
    again = stored_ablation(folder)
    assert isinstance(again, PathEffects)
    assert again.patched.equal(found.patched)
    assert again.share.equal(found.share)
    assert (again.senders, again.receivers) == (found.senders, found.receivers)
    with pytest.raises(FileError, match="another sweep"):
        al.path_patch(lens, task, receivers, "L0,embed", sweep=resumed)


def test_trials_can_be_sent_to_other_processes(random_lens: Lens, task: Task) -> None:
    from attnlens.analyses.frozen_paths import frozen_trials
    from attnlens.analyses.path_ends import receivers_of, senders_of

    senders = senders_of(random_lens, "L0")
    trials = frozen_trials(
        random_lens, task, senders, receivers_of(random_lens, "L2H1"), SweepSettings()
    )
    before = trials[0].of_prompts(random_lens, slice(0, 3))
    after = pickle.loads(pickle.dumps(trials[0])).of_prompts(random_lens, slice(0, 3))  # noqa: S301 - made above
    assert len(pickle.dumps(trials)) < 20_000  # what was recorded stays here
    for one, other in zip(before, after, strict=True):
        assert one.values["L2"].equal(other.values["L2"])
