"""Activation patching: circuits that are known, and full forwards one at a time."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.patching import Patching, patch
from attnlens.analyses.stored import stored_ablation
from attnlens.errors import HeadError, InputError
from attnlens.lens import Lens
from attnlens.sweeps.patches import patch_trials, places_of
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task, other_name, repeated_tokens
from attnlens.zoo import naming
from tests.sweeps.naive import lens_of, task_of

KINDS = ("q", "k", "v", "z", "pattern", "residual", "mlp")
OF_NAMES = (naming.DUPLICATE_HEAD, naming.PREVIOUS_HEAD, naming.INDUCTION_HEAD)


@pytest.fixture(scope="module")
def names_lens() -> Lens:
    return al.load(naming.name_model().double())


@pytest.fixture(scope="module")
def names(names_lens: Lens) -> Task:
    return other_name(names_lens, prompts=5)


def metrics(lens: Lens, task: Task) -> tuple[Tensor, Tensor]:
    """The metric of clean and corrupt prompts."""
    inputs = task.clean_inputs(), task.corrupt_inputs()
    clean, corrupt = (task.score(lens.logits(own, task.reads)).double() for own in inputs)
    return clean, corrupt


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_whole_stream_is_the_other_run(names_lens: Lens, names: Task, direction: str) -> None:
    """No layer reads more than the stream: given that of the twin, the run is the twin's."""
    clean, corrupt = metrics(names_lens, names)
    found = patch(names_lens, names, "residual", direction=direction)
    sign = 1 if direction == "denoise" else -1
    wanted = sign * (clean - corrupt).mean()
    assert found.places == ("L0", "L1", "L2", "L3")
    assert found.heads == ((),) * 4
    torch.testing.assert_close(found.effect, wanted.expand(4), rtol=1e-12, atol=0)
    for share in (found.share, found.share_low, found.share_high):
        torch.testing.assert_close(share, torch.ones(4).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.clean, clean, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.corrupt, corrupt, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.gap, (clean - corrupt).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["q", "k", "v", "z", "pattern"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_heads_outside_the_circuit_carry_nothing(
    names_lens: Lens, names: Task, kind: str, direction: str
) -> None:
    found = patch(names_lens, names, kind, direction=direction)
    share = dict(zip(found.places, found.share.tolist(), strict=True))
    aside = [share[name] for name in (*naming.IDLE, *naming.BYSTANDERS)]
    assert max(map(abs, aside)) < 1e-12
    # An edge of `name_circuit` that ends in an input of a head is a reason for it to matter.
    receivers = {edge.receiver for edge in naming.name_circuit() if edge.kind == kind}
    if kind in ("q", "k"):
        assert {name for name, own in share.items() if abs(own) > 1e-9} == receivers


def test_the_movers_do_half_each_and_others_move_them(names_lens: Lens, names: Task) -> None:
    """The logits are a sum of what two equal movers write."""
    for direction in ("denoise", "noise"):
        found = patch(names_lens, names, "z", direction=direction)
        share = dict(zip(found.places, found.share.tolist(), strict=True))
        for mover in naming.MOVERS:
            assert share[mover] == pytest.approx(0.5, abs=1e-6)
        assert all(share[name] > 0.3 for name in (*OF_NAMES, *naming.INHIBITION_HEADS))


def test_where_the_circuit_writes(names_lens: Lens, names: Task) -> None:
    """Movers answer at the last position, where the inhibition heads wrote to them."""
    heads = ",".join((*naming.MOVERS, *naming.INHIBITION_HEADS))
    whole = patch(names_lens, names, "z", heads)
    found = patch(names_lens, names, "z", heads, "each")
    assert found.effect.shape == (4, 14)
    assert found.positions == tuple(range(14))
    torch.testing.assert_close(found.effect[:, -1], whole.effect, rtol=1e-9, atol=0)
    assert (found.effect[:, :-1].abs() < 1e-12).all()


def test_the_induction_circuit(induction_lens: Lens) -> None:
    task = repeated_tokens(induction_lens, prompts=4, period=8)
    found = patch(induction_lens, task, "z", metric="logit_difference")
    share = dict(zip(found.places, found.share.tolist(), strict=True))
    assert {name for name, own in share.items() if abs(own) > 1e-4} == {"L0H1", "L1H2"}
    assert share["L1H2"] == pytest.approx(1, abs=1e-3)


def by_hand(
    lens: Lens, task: Task, kind: str, place: str, direction: str, position: int | None
) -> Tensor:
    """The metric of each prompt in one full forward."""
    inputs = [task.clean_inputs(), task.corrupt_inputs()]
    given, run = inputs if direction == "denoise" else inputs[::-1]
    kept = lens.run(given, keep=kind)[kind]
    edit: Any
    if kind in ("residual", "mlp"):
        edit = al.PatchStream(place, stream=kind, values=kept, queries=position)
    elif kind in ("k", "v"):
        edit = al.Patch(place, kind, kept, keys=position)
    else:
        edit = al.Patch(place, kind, kept, queries=position)
    with lens.edit(edit):
        return task.score(lens.logits(run, task.reads)).double()


def close(found: Tensor, wanted: Tensor, rounding: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding)


def rounding_of(lens: Lens, kind: str) -> float:
    """Some models take every softmax in float32, whatever their own dtype."""
    return 1e-6 if kind == "pattern" and any(s.upcast for s in lens.anatomy.sites) else 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_each_value_is_that_of_a_full_forward(name: str, kind: str, direction: str) -> None:
    """Prompts of three lengths; llama and gemma2 share keys and values between heads.

    The attention of gemma2 makes NaN of padding, so its prompts have one.
    """
    lens = lens_of(name)
    task = task_of(lens, (12, 12, 12) if name == "gemma2" else (14, 9, 12), same=5)
    rounding = rounding_of(lens, kind)
    for positions in (None, (6, -1), "each"):
        found = patch(lens, task, kind, positions=positions, direction=direction)
        clean, corrupt = metrics(lens, task)
        close(found.clean, clean)
        close(found.corrupt, corrupt)
        run = corrupt if direction == "denoise" else clean
        where: Sequence[int | None] = found.positions or [None]
        values = found.patched.reshape(len(found.places), len(where), 3)
        for i in {0, len(found.places) // 2, len(found.places) - 1}:
            spec = str(found.heads[i][-1]) if found.heads[i] else found.places[i]
            wanted = [by_hand(lens, task, kind, spec, direction, p) for p in where]
            close(values[i], torch.stack(wanted), rounding)
        effect = (found.patched - run).mean(-1)
        close(found.effect, effect)
        gap = (clean - corrupt).mean() * (1 if direction == "denoise" else -1)
        close(found.share, effect / gap)
        close(found.gap, (clean - corrupt).mean())


def test_before_the_twins_differ_there_is_nothing_to_patch() -> None:
    lens = lens_of("llama")
    task = task_of(lens, (14, 12), same=5)
    found = patch(lens, task, "v", positions="each")
    assert (found.effect[:, :5].abs() < 1e-12).all()
    assert (found.effect[:, 5:].abs() > 1e-6).any()


def test_positions_from_the_end_are_those_from_the_start() -> None:
    """Of prompts of one length; runs that share a prefix begin there in both."""
    lens = lens_of("gpt2")
    task = task_of(lens, (24, 24))
    back = patch(lens, task, "z", positions=range(-14, 0))
    ahead = patch(lens, task, "z", positions=range(10, 24))
    close(back.patched, ahead.patched)
    assert (back.effect.abs() > 1e-6).any()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_full_forwards_give_the_same(kind: str) -> None:
    lens = lens_of("llama")
    task = task_of(lens, (14, 9, 12, 13), same=4)
    for positions in (None, (5, -2)):
        whole = patch(lens, task, kind, positions=positions)
        for sweep in (
            SweepSettings(batch_size=1),
            SweepSettings(batch_size=3, tokens=1),
            SweepSettings(restart=False),
        ):
            found = patch(lens, task, kind, positions=positions, sweep=sweep)
            close(found.patched, whole.patched, rounding_of(lens, kind))
            close(found.share_low, whole.share_low, 1e-6)


def test_an_encoder_and_its_decoder() -> None:
    """The encoder's stream by itself is all of the twin: the decoder is given the same start."""
    lens = lens_of("t5")
    task = task_of(lens, (9, 12))
    found = patch(lens, task, "residual", "enc.L0,dec.L1,enc.L1")
    # What the decoder asks is that of the run that is patched, so its stream is not all.
    share = dict(zip(found.places, found.share.tolist(), strict=True))
    assert share["enc.L0"] == pytest.approx(1, abs=1e-9)
    assert share["enc.L1"] == pytest.approx(1, abs=1e-9)
    assert abs(share["dec.L1"] - 1) > 1e-3
    clean, corrupt = metrics(lens, task)
    close(found.clean, clean)
    close(found.corrupt, corrupt)


def test_heads_that_share_keys_are_one_place() -> None:
    lens = lens_of("llama")  # 4 heads, 2 groups
    task = task_of(lens, (9, 9))
    found = patch(lens, task, "k")
    assert found.places[:2] == ("L0H0-1", "L0H2-3")
    assert found.heads[1] == lens.anatomy.find("L0H2,L0H3")
    assert any("move together: L0H0-1 is L0H0, L0H1" in note for note in found.notes)
    one = patch(lens, task, "k", "L0H3,L0H2")
    assert one.places == ("L0H2-3",)
    assert torch.equal(one.effect, found.effect[1:2])
    own = patch(lens, task, "q")
    assert own.places[:2] == ("L0H0", "L0H1")
    assert not any("together" in note for note in own.notes)


def test_clean_and_corrupt_prompts_that_are_the_same_have_no_share(
    names_lens: Lens, names: Task
) -> None:
    same = replace(names, corrupt=names.clean)
    found = patch(names_lens, same, "z", "L3")
    assert (found.effect == 0).all()
    assert found.share.isnan().all()
    assert found.share_low.isnan().all()
    assert "No shares: logit_difference is the same" in found.notes[0]


def test_a_gap_that_may_be_none_is_said(names_lens: Lens, names: Task) -> None:
    """Of two prompts the twins change places: what one gains the other loses, nearly."""
    turned = names.subset([0, 1, 2, 3])
    swap = torch.tensor([True, False, True, False])[:, None]
    mixed = replace(
        turned,
        clean=torch.where(swap, turned.corrupt, turned.clean),
        corrupt=torch.where(swap, turned.clean, turned.corrupt),
    )
    found = patch(names_lens, mixed, "z", "L3")
    assert "Shares mean little" in found.notes[0]
    assert found.gap_low < 0 < found.gap_high
    plain = patch(names_lens, names, "z", "L3")
    assert plain.notes == ()


def test_a_model_whose_last_layer_reads_more_than_the_stream_has_effects_alone() -> None:
    lens = lens_of("zamba")  # its attention reads the embeddings beside the stream
    task = task_of(lens, (9, 9))
    found = patch(lens, task, "z", "L3", direction="noise")
    assert found.share.isnan().all()
    assert found.corrupt.isnan().all()
    assert any("cannot be given all of the other run" in note for note in found.notes)
    wanted = by_hand(lens, task, "z", found.places[0], "noise", None)
    close(found.patched[0], wanted)
    assert found.effect.isfinite().all()


def same_result(one: Patching, other: Patching) -> None:
    for name, value in vars(one).items():
        mine = getattr(other, name)
        if isinstance(value, Tensor):
            close(mine, value)
        else:
            assert mine == value, name


def test_a_sweep_that_was_stopped_goes_on(names_lens: Lens, names: Task, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"positions": (3, -1), "seed": 3}
    sweep = SweepSettings(batch_size=2, store=tmp_path / "sweep")
    with pytest.raises(KeyboardInterrupt):
        patch(names_lens, names, "z", "L3", sweep=sweep, progress=stop, **how)
    part = stored_ablation(tmp_path / "sweep")
    assert "values are missing" in part.notes[0]
    done = patch(names_lens, names, "z", "L3", sweep=replace(sweep, resume=True), **how)
    whole = patch(names_lens, names, "z", "L3", **how)
    same_result(whole, done)
    read = stored_ablation(tmp_path / "sweep")
    assert isinstance(read, Patching)
    same_result(done, read)
    sweep = replace(sweep, resume=True)
    with pytest.raises(al.errors.FileError, match="another sweep"):
        patch(names_lens, names, "z", "L3", direction="noise", sweep=sweep, **how)


def test_trials_travel_without_what_they_keep(names_lens: Lens, names: Task) -> None:
    places = places_of(names_lens, "z", "L3")
    trials = patch_trials(names_lens, names, "z", places, None)
    before = trials[0].of_prompts(names_lens, slice(0, 2))
    sent = pickle.loads(pickle.dumps(trials))  # noqa: S301 - made above
    assert len(pickle.dumps(trials[0])) < 20_000
    after = sent[0].of_prompts(names_lens, slice(0, 2))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.values["L3"], other.values["L3"])  # type: ignore[attr-defined]


def test_the_frame_has_a_row_a_place_and_position(names_lens: Lens, names: Task) -> None:
    found = patch(names_lens, names, "z", "L3H0,L3H2", (3, -1))
    frame = found.to_frame()
    assert frame["place"].tolist() == ["L3H0", "L3H0", "L3H2", "L3H2"]
    assert frame["position"].tolist() == [3, -1] * 2
    assert frame["effect"].tolist() == found.effect.flatten().tolist()
    assert frame["share_high"].tolist() == found.share_high.flatten().tolist()
    ids = names.clean[0][[3, -1]].tolist()
    assert found.tokens == names_lens.token_texts(ids)
    whole = patch(names_lens, names, "residual", [1, 3]).to_frame()
    assert whole["place"].tolist() == whole["site"].tolist() == ["L1", "L3"]
    assert "position" not in whole


def test_what_cannot_be_patched_is_refused(names_lens: Lens, names: Task) -> None:
    with pytest.raises(InputError, match="choose q, k, v, z, pattern, residual, mlp"):
        patch(names_lens, names, "scores")
    with pytest.raises(InputError, match="choose denoise or noise"):
        patch(names_lens, names, direction="clean")
    with pytest.raises(InputError, match="choose -14 to 13"):
        patch(names_lens, names, positions=(14,))
    with pytest.raises(InputError, match='give "each"'):
        patch(names_lens, names, positions="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="heads are written 'L3'"):
        patch(names_lens, names, places=3)
    with pytest.raises(HeadError, match="L9"):
        patch(names_lens, names, places="L9")
    with pytest.raises(InputError, match="has no mlp of its own"):  # its MLPs write nothing
        patch(names_lens, names, "mlp")
    with pytest.raises(InputError, match="Cannot bootstrap"):
        patch(names_lens, names, resamples=0)
