from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.basin import (
    AttentionBasin,
    DocumentPrompt,
    SlotMass,
    attention_basin,
    pack_documents,
)
from attnlens.analyses.uncertainty import Interval
from attnlens.errors import InputError, TaskError
from attnlens.lens import Lens
from attnlens.zoo import small_path
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES

DOCUMENTS = [
    "The baker sold bread & <b>rolls</b> in the morning.",
    "A ship came home.",
    "Her garden was full of roses, and bees were in all of them.",
]
QUERY = "Who sold bread?"


@cache
def small() -> Lens:
    return al.load(small_path())


def prompt(lengths: list[int], query: int, seed: int = 0, gap: int = 1) -> DocumentPrompt:
    """A start token, documents of these lengths with tokens between them, and a query."""
    place, slots = 1, []
    for length in lengths:
        slots.append((place, place + length))
        place += length + gap
    ids = torch.randint(20, 40, (place + query,), generator=torch.Generator().manual_seed(seed))
    return DocumentPrompt(tuple(ids.tolist()), tuple(slots), (place, place + query))


def by_hand(pattern: Tensor, example: DocumentPrompt) -> Tensor:
    """`head slot` from one prompt's maps `head query key`, one weight at a time."""
    rows = range(*example.query)
    return torch.tensor(
        [
            [
                sum(float(head[t, s]) for t in rows for s in range(*slot)) / len(rows)
                for slot in example.slots
            ]
            for head in pattern.double()
        ],
        dtype=torch.float64,
    )


def dense(lens: Lens, examples: list[DocumentPrompt], stack: str = "") -> Tensor:
    """`example head slot`, each prompt run alone."""
    found = []
    for example in examples:
        maps = lens.run(torch.tensor([example.ids]), keep="pattern").pattern.stack(stack)
        found.append(by_hand(maps[0].flatten(0, 1), example))
    return torch.stack(found)


def test_even_attention_in_closed_form(even_lens: Lens) -> None:
    examples = [prompt([3, 5, 2, 4], 3, seed) for seed in range(3)]
    found = attention_basin(even_lens, examples)
    rows = range(*examples[0].query)
    weight = sum(1 / (t + 1) for t in rows) / len(rows)  # of each key
    for slot, length in enumerate((3, 5, 2, 4)):
        assert found.per_head.total.mean[:, slot].tolist() == pytest.approx([length * weight] * 12)
        assert found.per_layer.total.mean[:, slot].tolist() == pytest.approx([length * weight] * 3)
        assert float(found.mean.per_token.mean[slot]) == pytest.approx(weight)
    assert found.tokens.tolist() == [3, 5, 2, 4]
    assert found.mean.total.low.tolist() == pytest.approx(found.mean.total.high.tolist())
    assert any("differ in length" in note for note in found.notes)


@settings(max_examples=10)
@given(
    data=st.lists(
        st.tuples(st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(1, 4)),
        min_size=1,
        max_size=5,
    ),
    batch_size=st.integers(1, 4),
)
def test_a_streamed_basin_is_the_dense_one(
    data: list[tuple[list[int], int]], batch_size: int
) -> None:
    lens = _random()
    examples = [prompt(lengths, query, i) for i, (lengths, query) in enumerate(data)]
    found = attention_basin(lens, examples, batch_size=batch_size)
    wanted = dense(lens, examples)
    assert torch.allclose(found.per_head.total.mean, wanted.mean(0), atol=1e-10)
    assert torch.allclose(found.mean.total.mean, wanted.mean((0, 1)), atol=1e-10)
    tokens = torch.tensor([[b - a for a, b in example.slots] for example in examples])
    assert torch.allclose(
        found.per_head.per_token.mean, (wanted / tokens[:, None]).mean(0), atol=1e-10
    )


def test_prompts_run_by_length_keep_their_own_slots() -> None:
    """Lengths 9, 5 and 7 run as 5, 7, 9: a turn that is not its own inverse."""
    examples = [prompt([3, 2], 2, 0), prompt([1, 1], 1, 1), prompt([1, 2], 2, 2)]
    found = attention_basin(_random(), examples, batch_size=1)
    tokens = torch.tensor([[3, 2], [1, 1], [1, 2]])
    wanted = (dense(_random(), examples) / tokens[:, None]).mean(0)
    assert torch.allclose(found.per_head.per_token.mean, wanted, atol=1e-10)


@cache
def _random() -> Lens:
    return al.load(tiny_gpt2())


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "bert", "gemma2"])
def test_windows_learned_sinks_and_both_sides(name: str) -> None:
    lens = architecture(name)
    examples = [prompt([3, 2, 4], 4, 0), prompt([3, 2, 4], 4, 1)]
    found = attention_basin(lens, examples)
    wanted = dense(lens, examples)
    assert torch.allclose(found.per_head.total.mean, wanted.mean(0), atol=1e-10)
    assert found.heads == lens.anatomy.heads
    assert any("sinks" in note for note in found.notes) == (name == "gpt_oss")


def test_half_precision_sums_in_float32() -> None:
    model = ARCHITECTURES["llama"].build()
    examples = [prompt([3, 2, 4], 3, 0)]
    exact = attention_basin(al.load(model.double()), examples).per_head.total.mean
    lens = al.load(model.bfloat16())
    half = attention_basin(lens, examples).per_head.total.mean
    assert torch.allclose(half, exact, atol=0.03)
    assert torch.allclose(half, dense(lens, examples)[0], atol=1e-6)  # of the same bf16 weights


def test_the_encoder_reads_the_documents_of_an_encoder_decoder() -> None:
    lens = architecture("t5")
    examples = [prompt([3, 2], 4, 0)]
    found = attention_basin(lens, examples)
    assert {head.stack for head in found.heads} == {"enc"}
    wanted = dense(lens, examples, "enc")
    assert torch.allclose(found.per_head.total.mean, wanted[0], atol=1e-10)
    with pytest.raises(InputError, match=r"At dec\.L0"):
        attention_basin(lens, examples, layers="dec.L0")


def planted() -> Lens:
    """Head 2 of layer 0 attends to token 7 wherever it stands."""
    model = tiny_gpt2(sharp=0.0)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight[:, 5] = 0
        model.transformer.wte.weight[7, 5] = 50
        attention = model.transformer.h[0].attn
        attention.c_attn.bias[16] = 20.0
        attention.c_attn.weight[5, 48] = 20.0
    return al.load(model)


def test_a_planted_head_gives_all_to_its_slot() -> None:
    plain = prompt([3, 3, 3], 2)
    start = plain.slots[1][0]
    ids = (*plain.ids[:start], 7, *plain.ids[start + 1 :])
    found = attention_basin(planted(), [DocumentPrompt(ids, plain.slots, plain.query)] * 2)
    assert found.per_head.total.mean[2].tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    assert found.per_head.per_token.mean[2].tolist() == pytest.approx([0, 1 / 3, 0], abs=1e-6)
    frame = found.to_frame().set_index(["head", "slot"])
    assert frame.loc[("L0H2", 1), "mass"] == pytest.approx(1, abs=1e-6)
    layers = found.by_layer().set_index(["site", "slot"])
    assert layers.loc[("L0", 1), "mass"] > layers.loc[("L1", 1), "mass"]
    assert found.by_slot()["mass"].idxmax() == 1
    # The best document goes to the slot with most mass, the next ones to what is left.
    assert found.reorder([0.1, 0.2, 0.9])[1] == 2
    assert sorted(found.reorder([0.1, 0.2, 0.9])) == [0, 1, 2]


def replace_mean(interval: Interval, mean: Tensor) -> Interval:
    return Interval(mean, interval.low, interval.high)


def test_reorder_puts_relevance_where_the_mass_is() -> None:
    plain = attention_basin(_random(), [prompt([2, 2, 2, 2], 2)])

    def basin(*means: list[float]) -> AttentionBasin:
        total, per_token = (
            replace_mean(plain.mean.total, torch.tensor(values)) for values in means
        )
        return replace(plain, mean=SlotMass(total, per_token))

    found = basin([0.4, 0.1, 0.2, 0.3], [0.1, 0.4, 0.3, 0.2])
    assert found.reorder([5, 1, 7, 3]) == (2, 1, 3, 0)
    assert found.reorder([5, 1, 7, 3], per_token=True) == (1, 2, 0, 3)
    assert found.reorder([1, 1, 1, 1]) == (0, 3, 2, 1)  # ties keep the documents' order
    for relevance in ([1, 2, 3], [1, 2, 3, float("nan")]):
        with pytest.raises(InputError, match="4 documents"):
            found.reorder(relevance)


@pytest.mark.parametrize("joint", ["\n\n", " ", "\n# "])
def test_spans_hold_their_documents_exactly(joint: str) -> None:
    lens = small()
    found = pack_documents(lens, DOCUMENTS, QUERY, opening="Read: ", joint=joint)
    words = lens.tokenizer
    for (start, stop), document in zip(found.slots, DOCUMENTS, strict=True):
        assert words.decode(found.ids[start:stop]).strip() == document
    assert words.decode(found.ids[slice(*found.query)]).strip() == QUERY
    assert found.query[1] == len(found.ids)


def test_texts_and_ids_agree_and_rotation_is_the_mean_of_all_turns() -> None:
    lens = small()
    packed = pack_documents(lens, DOCUMENTS, QUERY)
    texts = attention_basin(lens, [(DOCUMENTS, QUERY)])
    assert torch.equal(
        texts.per_head.total.mean, attention_basin(lens, [packed]).per_head.total.mean
    )
    wanted = dense(lens, [packed])
    assert torch.allclose(texts.per_head.total.mean, wanted[0], atol=1e-6)
    turns = [
        pack_documents(lens, DOCUMENTS[i:] + DOCUMENTS[:i], QUERY) for i in range(len(DOCUMENTS))
    ]
    others = [(["One fox.", "Two dogs ran.", "Three."], "How many?"), (DOCUMENTS, QUERY)]
    rotated = attention_basin(lens, others, rotate=True)
    assert rotated.prompts == 2
    assert rotated.rotated
    alone = attention_basin(lens, others[1:], rotate=True)
    assert torch.allclose(alone.per_head.total.mean, dense(lens, turns).mean(0), atol=1e-6)
    first = attention_basin(lens, others[:1], rotate=True).mean.total.mean
    both = torch.stack([first, alone.mean.total.mean])
    assert torch.allclose(rotated.mean.total.mean, both.mean(0), atol=1e-6)
    assert (rotated.mean.total.low >= both.amin(0) - 1e-6).all()
    with pytest.raises(InputError, match="as texts"):
        attention_basin(lens, [packed], rotate=True)


def test_what_cannot_be_packed_or_measured_is_refused(random_lens: Lens) -> None:
    with pytest.raises(InputError, match="2 to 3 documents"):
        attention_basin(random_lens, [prompt([2, 2], 1), prompt([2, 2, 2], 1)])
    with pytest.raises(InputError, match="no example"):
        attention_basin(random_lens, [])
    with pytest.raises(TaskError, match="no tokenizer"):
        attention_basin(random_lens, [(DOCUMENTS, QUERY)])
    with pytest.raises(InputError, match="none of them empty"):
        pack_documents(small(), ["a", " "], QUERY)
    for slots, query in (
        (((0, 2), (1, 3)), (3, 4)),
        (((0, 2), (2, 2)), (3, 4)),
        (((0, 2),), (1, 4)),
        (((0, 2),), (3, 9)),
        ((), (3, 4)),
    ):
        with pytest.raises(InputError, match="one after the other"):
            DocumentPrompt((1, 2, 3, 4), slots, query)


def test_texts_in_the_place_of_documents_are_refused() -> None:
    for examples in ([("one", "two")], (DOCUMENTS, QUERY), "one", [5], [(DOCUMENTS,)]):
        with pytest.raises(InputError, match="list of documents and a query"):
            attention_basin(small(), examples)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch_size=0"):
        attention_basin(small(), [(DOCUMENTS, QUERY)], batch_size=0)


def test_examples_may_be_read_once() -> None:
    found = attention_basin(small(), iter([(DOCUMENTS, QUERY)] * 2), resamples=2)
    assert found.prompts == 2


def test_relevance_that_is_no_number_is_refused() -> None:
    found = attention_basin(small(), [(DOCUMENTS, QUERY)], resamples=2)
    with pytest.raises(InputError, match="no finite number"):
        found.reorder(["high"] * found.slots)  # type: ignore[list-item]
