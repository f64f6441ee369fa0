"""Where an edit acts: positions of padded and growing texts, phases, caches, beams, threads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

import attnlens as al
from attnlens.errors import InputError
from attnlens.hooks.edits import Edit
from attnlens.hooks.positions import Positions, resolve
from attnlens.lens import Lens
from tests.hooks.editing import IDS, lens


def test_positions_count_real_tokens() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    ids = torch.arange(15).view(3, 5)

    def even(ids: Tensor) -> Tensor:
        return ids % 2 == 0

    cases: list[tuple[Positions, list[list[int]]]] = [
        (None, [[2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2]]),
        (0, [[2], [0], [0]]),
        (-1, [[4], [4], [2]]),
        ([0, -1], [[2, 4], [0, 4], [0, 2]]),
        (torch.tensor([1, 1]), [[3], [1], [1]]),
        (slice(1, None), [[3, 4], [1, 2, 3, 4], [1, 2]]),
        (slice(-2, None), [[3, 4], [3, 4], [1, 2]]),
        (slice(None, None, 2), [[2, 4], [0, 2, 4], [0, 2]]),
        (torch.tensor([1, 1, 1, 0, 0]).bool(), [[2], [0, 1, 2], [0, 1, 2]]),
        (torch.eye(5)[:3].bool(), [[], [1], [2]]),
        (even, [[2, 4], [1, 3], [0, 2]]),
        (np.int64(-1), [[4], [4], [2]]),  # type: ignore[list-item]
        (np.array([0, -1]), [[2, 4], [0, 4], [0, 2]]),  # type: ignore[list-item]
        (np.eye(5)[:3] > 0, [[], [1], [2]]),  # type: ignore[list-item]
        (range(2), [[2, 3], [0, 1], [0, 1]]),
    ]
    for positions, wanted in cases:
        mask = resolve(positions, real, ids)
        assert [row.nonzero()[:, 0].tolist() for row in mask] == wanted, positions


@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    left=st.booleans(),
    start=st.none() | st.integers(-9, 9),
    stop=st.none() | st.integers(-9, 9),
    step=st.none() | st.integers(1, 3),
)
def test_a_slice_takes_what_a_list_of_the_real_tokens_gives(
    lengths: list[int], left: bool, start: int | None, stop: int | None, step: int | None
) -> None:
    width = max(lengths)
    real = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row, width - length :] = left or real[row, width - length :]
        real[row, :length] = not left or real[row, :length]
    mask = resolve(slice(start, stop, step), real, None)
    for row, own in enumerate(real):
        assert mask[row].nonzero()[:, 0].tolist() == own.nonzero()[:, 0].tolist()[start:stop:step]


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        (12, "Position 12 is outside prompt 0, which has 12 tokens: choose -12 to 11, or a slice"),
        ([0, -13], "Position -13 is outside"),
        (torch.ones(5).bool(), r"A mask of positions has shape \[5\], and the input is \[1, 12\]"),
        (torch.ones(2, 12).bool(), r"shape \[2, 12\], and the input is \[1, 12\].*beams"),
        (lambda ids: ids, r"must return a boolean tensor of the shape of the ids, \[1, 12\]"),
        (lambda ids: (ids > 3)[:, 1:], "must return a boolean tensor"),
        ("last", "'last' names no positions"),
        (1.5, "1.5 names no positions"),
        ("", "'' names no positions"),
        (True, "True names no positions"),
        ([True] * 12, r"mask \(a boolean tensor\)"),
        (slice(0, 1.5), r"slice\(0, 1.5, None\) names no positions"),
        (slice(None, None, 0), "names no positions"),
        (torch.tensor([[1, 2]]), r"\[\[1, 2\]\] names no positions"),
        (torch.tensor([1.0]), "names no positions"),
        (torch.tensor(True), r"A mask of positions has shape \[\], and"),
    ],
)
def test_wrong_positions_are_told(positions: Any, says: str) -> None:
    subject = lens("gpt2")
    with pytest.raises(InputError, match=says), torch.no_grad():  # noqa: SIM117
        with subject.edit(al.Zero("L0H1", queries=positions)):
            subject.model(input_ids=IDS)
    with pytest.raises(InputError, match="no phase 'answer'; choose all, prefill, decode"):
        al.Zero("L0H1", phase="answer")  # type: ignore[arg-type]


def moved_rows(subject: Lens, edit: Edit, site: str, ids: Tensor, **inputs: Tensor) -> Tensor:
    """Which rows of a site's z an edit moves, `batch row`."""
    given = {"input_ids": ids, **inputs}
    plain = subject.run(given, keep="z").z[site]
    with subject.edit(edit):
        edited = subject.run(given, keep="z").z[site]
    return (plain != edited).any(3).any(1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_rows_that_are_not_named_and_padding_stay(name: str, side: str) -> None:
    subject = lens(name)
    ids = torch.cat([IDS, IDS.roll(3, 1)])
    mask = torch.ones_like(ids)
    mask[1, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    first = 5 if side == "left" else 0
    for positions, wanted in (
        (None, [list(range(12)), list(range(first, first + 7))]),
        ([1, -2], [[1, 10], [first + 1, first + 5]]),
        (slice(4, None), [list(range(4, 12)), list(range(first + 4, first + 7))]),
        (lambda ids: ids == 21, [[1], [4] if side == "right" else []]),
    ):
        moved = moved_rows(
            subject, al.Zero("L1H2", queries=positions), "L1", ids, attention_mask=mask
        )
        assert [row.nonzero()[:, 0].tolist() for row in moved] == wanted


def answer(subject: Lens, ids: Tensor, steps: int = 4, **more: Any) -> Tensor:
    """Scores of `generate`, greedy, a step each: `step batch vocab`."""
    found: Any = subject.model.generate(  # type: ignore[operator]
        ids,
        max_new_tokens=steps,
        eos_token_id=10_000,  # none: all steps are written
        do_sample=False,
        pad_token_id=1,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )
    return torch.stack(found.logits)


def by_hand(subject: Lens, ids: Tensor, edits: dict[int, Edit | None], steps: int = 4) -> Tensor:
    """The same by a loop with a cache, with one edit a step."""
    cache, found = DynamicCache(config=subject.model.config), []
    with torch.no_grad():
        for step in range(steps):
            edit = edits.get(step)
            if edit is None:
                logits = subject.model(input_ids=ids, past_key_values=cache).logits[:, -1]
            else:
                with subject.edit(edit):
                    logits = subject.model(input_ids=ids, past_key_values=cache).logits[:, -1]
            found.append(logits)
            ids = logits.argmax(-1, keepdim=True)
    return torch.stack(found)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **at: al.Zero("L0H1", **at),
        lambda **at: al.Uniform("L1H0", **at),
        lambda **at: al.Identity("L1", **at),
        lambda **at: al.Hide("L1H1", keys=[2, -2], **at),
        lambda **at: al.SteerStream("L1", vectors={"L1": torch.ones(32)}, **at),
    ],
)
def test_phases_are_a_loop_with_a_cache_and_sum_to_all(name: str, make: Any) -> None:
    """Past the window of mistral, too: its cache then holds fewer keys than the text."""
    subject = lens(name)
    found: dict[str, Tensor] = {}
    for phase in ("prefill", "decode", "all"):
        with subject.edit(make(phase=phase)):
            found[phase] = answer(subject, IDS)
    prefill, decode = {0: make()}, dict.fromkeys(range(1, 4), make())
    torch.testing.assert_close(found["prefill"], by_hand(subject, IDS, prefill))
    torch.testing.assert_close(found["decode"], by_hand(subject, IDS, decode))
    torch.testing.assert_close(found["all"], by_hand(subject, IDS, prefill | decode))
    with subject.edit(make(phase="prefill"), make(phase="decode")):
        assert torch.equal(answer(subject, IDS), found["all"])
    assert not torch.equal(found["prefill"], found["decode"])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **at: al.Zero("L1H1", **at),
        lambda **at: al.Uniform("L1H1", **at),
        lambda **at: al.Identity("L1H1", 0.5, **at),
        lambda **at: al.Hide("L1H1", keys=[3, 11], **at),
        "k",
        "q",
    ],
)
def test_with_a_cache_as_without(name: str, make: Any) -> None:
    """Positions mean the same token in the prompt's pass and in later ones; windows too."""
    subject = lens(name)
    site = subject.anatomy["L1"]

    def queries(ids: Tensor) -> Tensor:
        return (ids % 2 == 0) | (ids == 31)

    edit: Edit
    if make == "k":
        vectors = {"L1": torch.ones(site.groups, site.d_qk)}
        edit = al.Steer("L1H1", "k", vectors, keys=slice(8, 13))
    elif make == "q":
        vectors = {"L1": torch.ones(site.heads, site.d_qk)}
        edit = al.Steer("L1H1", "q", vectors, queries=queries)
    else:
        edit = make(queries=queries)
    with subject.edit(edit):
        found = answer(subject, IDS)
        text = torch.cat([IDS, found.argmax(-1).T], dim=1)
        with torch.no_grad():
            whole = subject.model(input_ids=text, use_cache=False).logits
    torch.testing.assert_close(found[:, 0], whole[0, 11:15], atol=2e-5, rtol=1e-4)
    plain = answer(subject, IDS)
    assert not torch.equal(plain, found)


def test_what_is_kept_of_a_prompt_leaves_its_answer_alone() -> None:
    subject = lens("llama")
    theirs = subject.run(IDS + 30, keep=("q", "k", "z", "pattern", "residual"))
    for make in (
        lambda **at: al.Patch("L1", "q", theirs.q, **at),
        lambda **at: al.Patch("L1", "z", theirs.z, **at),
        lambda **at: al.Patch("L1", "pattern", theirs.pattern, **at),
        lambda **at: al.PatchStream("L1", values=theirs.residual, **at),
    ):
        with subject.edit(make()):
            found = answer(subject, IDS)
        with subject.edit(make(phase="prefill")):
            assert torch.equal(found, answer(subject, IDS))
    # Keys of the prompt are seen by the answer, too.
    with subject.edit(al.Patch("L1", "k", theirs.k)):
        found = answer(subject, IDS)
    with subject.edit(al.Patch("L1", "k", theirs.k, keys=slice(0, 12))):
        assert torch.equal(found, answer(subject, IDS))
    with subject.edit(al.Patch("L1", "k", theirs.k, phase="prefill")):
        assert not torch.equal(found[1:], answer(subject, IDS)[1:])


def test_a_longer_text_serves_where_later_tokens_do_not_matter() -> None:
    for name in ("llama", "bert"):
        subject = lens(name)
        long = torch.arange(40, 55)[None]
        kept, short = subject.run(long, keep="k").k, subject.run(long[:, :12], keep="k").k
        if name == "bert":
            says = "k for L0 covers 15 positions and the input has 12"
            with pytest.raises(InputError, match=says), subject.edit(al.Patch("L0", "k", kept)):
                subject.run(IDS)
            continue
        with subject.edit(al.Patch("L0", "k", kept)):
            found = subject.run(IDS, keep="z").z["L0"]
        with subject.edit(al.Patch("L0", "k", short)):
            torch.testing.assert_close(found, subject.run(IDS, keep="z").z["L0"])


def test_decoding_by_the_lens_is_edited_too() -> None:
    subject = lens("llama")
    edit = al.Zero("L0", phase="decode")
    with subject.edit(edit):
        found = subject.decode(IDS, 4, stop=())
    # The lens reads the prompt's last token as the first decoded row.
    cache, ids, written = DynamicCache(config=subject.model.config), IDS[:, -1:], []
    with torch.no_grad():
        subject.model(input_ids=IDS[:, :-1], past_key_values=cache)
        with subject.edit(al.Zero("L0")):
            for _ in range(4):
                logits = subject.model(input_ids=ids, past_key_values=cache).logits[:, -1]
                ids = logits.argmax(-1, keepdim=True)
                written.append(int(ids))
    assert found.answers == (tuple(written),)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_padding_in_generate_is_no_position(name: str) -> None:
    subject = lens(name)
    short = torch.cat([torch.full((1, 4), 1), IDS[:, :8]], dim=1)
    mask = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
    edit = al.Hide("L1H1", keys=[0, -1])
    with subject.edit(edit):
        together = answer(subject, torch.cat([IDS, short]), attention_mask=mask)
        alone = answer(subject, IDS[:, :8])
    torch.testing.assert_close(together[:, 1:], alone, atol=2e-5, rtol=1e-4)


def test_a_mask_serves_its_batch_and_beams_are_told() -> None:
    subject = lens("llama")
    ids = torch.cat([IDS, IDS + 12])
    edit = al.Zero("L0", queries=torch.ones(2, 12).bool(), phase="prefill")
    with subject.edit(edit):
        answer(subject, ids)
    says = r"\[2, 12\], and the input is \[6, 12\].*beams"
    with pytest.raises(InputError, match=says), subject.edit(edit):
        answer(subject, ids, num_beams=3)
    values = {"L0": torch.zeros(2, 4, 12, 8)}
    says, edit = "q for L0 is of 2 prompts and the input has 6", al.Patch("L0", "q", values)
    with pytest.raises(InputError, match=says), subject.edit(edit):
        answer(subject, ids, num_beams=3)
    with subject.edit(al.Zero("L0H1", queries=[0, -1])):
        answer(subject, ids, num_beams=3)


def test_a_static_cache_has_room_for_more() -> None:
    """Its keys go on past the text: they are no positions."""
    subject = lens("llama")
    edits = [al.Hide("L1H1", keys=[0, -1]), al.Uniform("L0H1"), al.Identity("L0H2")]
    z = subject.run(IDS, keep=("k", "z"))
    edits.append(al.Patch("L1", "k", z.k))
    found: list[Tensor] = []
    for cache in (
        DynamicCache(config=subject.model.config),
        StaticCache(config=subject.model.config, max_cache_len=20),
    ):
        ids = IDS
        with torch.no_grad(), subject.edit(*edits):
            for _ in range(3):
                logits = subject.model(input_ids=ids, past_key_values=cache).logits[:, -1]
                ids = logits.argmax(-1, keepdim=True)
                found.append(logits)
    torch.testing.assert_close(torch.stack(found[:3]), torch.stack(found[3:]))


def test_positions_under_a_mask_that_does_not_tell_padding_are_refused() -> None:
    subject = lens("llama")
    says, edit = "padding of this pass is not known", al.Zero("L0", queries=-1)
    with pytest.raises(InputError, match=says), subject.edit(edit):
        answer(subject, IDS, cache_implementation="static")
    with subject.edit(al.Zero("L0")):
        static = answer(subject, IDS, cache_implementation="static")
        torch.testing.assert_close(static, answer(subject, IDS))


def test_embeddings_have_positions_but_no_ids() -> None:
    subject = lens("llama")
    embeds = subject.model.get_input_embeddings()(torch.cat([IDS, IDS]))  # type: ignore[operator]
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[1, 3] = True
    for positions in ([3, -1], mask, slice(2, 4)):
        with torch.no_grad(), subject.edit(al.Zero("L0", queries=positions)):
            one = subject.model(inputs_embeds=embeds).logits
            two = subject.model(input_ids=torch.cat([IDS, IDS])).logits
        torch.testing.assert_close(one, two)
    edit = al.Zero("L0", queries=lambda ids: ids > 4)
    with pytest.raises(InputError, match="ids of this pass are not known"), subject.edit(edit):
        subject.model(inputs_embeds=embeds)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder_in_generate(name: str) -> None:
    """`generate` runs the encoder by itself: its padding and its ids are known all the same."""
    subject = lens(name)
    mask = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
    ids = torch.cat([IDS, torch.cat([IDS[:, :8], torch.ones(1, 4).long()], dim=1)])
    settings: dict[str, Any] = {"decoder_start_token_id": 2, "use_cache": True}

    def token(ids: Tensor) -> Tensor:
        return (ids == 21) | (ids == 27)

    for edit in (
        al.Zero("enc.L0", queries=[0, -1]),
        al.Uniform("enc.L1", queries=token),
        al.Hide("cross.L0", keys=token),
        al.Hide("cross.L1", keys=-1),
        al.Hide("dec.L0", keys=0, queries=slice(1, None)),
        al.Zero("cross.L0", phase="decode"),
        al.SteerStream("enc.L1", vectors={"enc.L1": torch.ones(32)}, queries=-1),
    ):
        with subject.edit(edit):
            together = answer(subject, ids, attention_mask=mask, **settings)
            alone = answer(subject, ids[1:, :8], **settings)
            again = answer(subject, ids[1:, :8], **settings)
        torch.testing.assert_close(together[:, 1:], alone, atol=2e-5, rtol=1e-4)
        assert torch.equal(alone, again)
        assert not torch.equal(alone, answer(subject, ids[1:, :8], **settings))


def test_passes_of_other_threads_are_left_alone() -> None:
    subject = lens("llama")
    with torch.no_grad():
        plain = subject.model(input_ids=IDS).logits
    found: list[Tensor] = []

    def elsewhere() -> None:
        with torch.no_grad():
            found.append(subject.model(input_ids=IDS).logits)

    vectors = {"L0": torch.ones(32), "L1": torch.ones(32)}
    edits = [
        al.SteerStream("L1", vectors=vectors),
        al.SteerStream("L0", stream="mlp", vectors=vectors),
        al.Zero("L0", queries=-1),
    ]
    with torch.no_grad(), subject.edit(*edits):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        edited = subject.model(input_ids=IDS).logits
    assert torch.equal(found[0], plain)
    assert not torch.equal(edited, plain)


def test_after_an_error_in_a_pass_the_model_is_as_before() -> None:
    subject = lens("llama")
    before = {name: len(m._forward_pre_hooks) for name, m in subject.model.named_modules()}
    with torch.no_grad():
        plain = subject.model(input_ids=IDS).logits
    edits = [
        al.Zero("L1", queries=99),
        al.SteerStream("L0", vectors={"L0": torch.ones(32)}),
    ]
    with pytest.raises(InputError, match="Position 99"), subject.edit(*edits):
        subject.model(input_ids=IDS)
    after = {name: len(m._forward_pre_hooks) for name, m in subject.model.named_modules()}
    with torch.no_grad():
        assert torch.equal(subject.model(input_ids=IDS).logits, plain)
    assert before == after
