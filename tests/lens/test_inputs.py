"""What may be given to a lens, what it becomes, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnlens as al
from attnlens.errors import BudgetError, HeadError, InputError
from attnlens.lens import Lens
from attnlens.lens.asked import parse_bytes
from tests.architectures import ARCHITECTURES


def opened(name: str) -> Lens:
    model = ARCHITECTURES[name].build()
    return Lens(model, example=ARCHITECTURES[name].inputs(model))


@pytest.fixture(scope="module")
def lens() -> Lens:
    return opened("llama")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Lens:
    """A model with a tokenizer."""
    return al.load(shared_data / "stories260K")


def test_forms_of_token_ids(lens: Lens) -> None:
    tensor = torch.tensor([[20, 21, 22]])
    forms: list[Any] = [
        [20, 21, 22],
        (20, 21, 22),
        [[20, 21, 22]],
        tensor,
        tensor[0],
        [tensor[0]],
        {"input_ids": tensor},
        {"input_ids": [[20, 21, 22]], "attention_mask": [[1, 1, 1]]},
    ]
    for form in forms:
        batch = lens.encode(form)
        assert torch.equal(batch.ids, tensor)
        assert batch.lengths == (3,)
        assert batch.tokens == (("20", "21", "22"),)
        assert batch.real is None


def test_texts_are_padded_on_the_right(stories: Lens) -> None:
    batch = stories.encode(["Once upon a time", "Once"])
    assert batch.lengths[0] > batch.lengths[1]
    assert batch.real is not None
    assert batch.real[1].tolist() == sorted(batch.real[1].tolist(), reverse=True)
    assert [len(words) for words in batch.tokens] == list(batch.lengths)
    alone = stories.run("Once").pattern["L1"]
    together = stories.run(["Once upon a time", "Once"]).pattern["L1"]
    length = batch.lengths[1]
    torch.testing.assert_close(together[1:, :, :length, :length], alone)
    assert together[1, :, :length, length:].eq(0).all()


def test_left_padding_counts_positions_from_the_first_token() -> None:
    """Learned positions: the padded prompt must read those that it reads alone."""
    lens = opened("gpt2")
    ids = torch.tensor([[0, 0, 20, 21, 22]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    padded = lens.run({"input_ids": ids, "attention_mask": mask}).pattern["L1"]
    torch.testing.assert_close(padded[..., 2:, 2:], lens.run(ids[:, 2:]).pattern["L1"])


def test_the_decoder_starts_where_nothing_is_said() -> None:
    lens = opened("bart")
    batch = lens.encode([20, 21, 22])
    start = lens.model.config.decoder_start_token_id
    assert batch.inputs["decoder_input_ids"].tolist() == [[start]]
    assert lens.run([20, 21, 22]).pattern["cross.L1"].shape == (1, 2, 1, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "empty"),
        ("", "no tokenizer"),
        ([[]], "shape [1, 0]"),
        (torch.zeros(0, dtype=torch.long), "shape [1, 0]"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "shape [1, 2, 3]"),
        ([[20, 21], [20]], "1 to 2 tokens"),
        ([[20, 21], [20]], "attention_mask"),
        ([20, 96], "the id 96; the model's vocabulary is 0 to 95"),
        ([20, -1], "the id -1"),
        (torch.tensor([0.5, 1.0]), "token ids are integers"),
        ([0.5, 1.0], "neither texts nor token ids"),
        (["a", 3], "neither texts nor token ids"),
        ([[1, 2], "b"], "neither texts nor token ids"),
        (3, "Cannot read int"),
        (None, "Cannot read NoneType"),
        ([20] * 65, "65 tokens and the model reads at most 64"),
        ("a text", "no tokenizer"),
        ({}, "no tensor"),
        ({"input_ids": None}, "no tensor"),
        (
            {"input_ids": torch.tensor([[20, 21]]), "attention_mask": torch.tensor([[1]])},
            "attention_mask has shape [1, 1] and input_ids [1, 2]",
        ),
        (
            {"input_ids": torch.tensor([[20, 21]]), "attention_mask": torch.tensor([[0, 0]])},
            "hides every token",
        ),
        ({"inputs_embeds": torch.full((1, 3, 32), float("nan"))}, "inputs_embeds holds NaN"),
    ],
)
def test_bad_inputs(lens: Lens, given: Any, words: str) -> None:
    for use in (lens.run, lens.encode, lambda x: lens.measure(x, al.Entropy()), lens.mean_z):
        with pytest.raises(InputError) as refused:
            use(given)
        assert words in str(refused.value)


@pytest.mark.parametrize("given", ["", "   ", ["Once", ""], ["Once", "\n"]])
def test_empty_texts(stories: Lens, given: Any) -> None:
    number = len(given) - 1 if isinstance(given, list) else 0
    with pytest.raises(InputError, match=f"Text {number} is empty"):
        stories.run(given)


def test_a_text_longer_than_the_context(stories: Lens) -> None:
    with pytest.raises(InputError, match=r"tokens and the model reads at most 512.*[Ss]horten"):
        stories.run("Once upon a time there was a dog. " * 200)


def test_prompts_stay_with_their_images() -> None:
    """All images' patches lie in one tensor, so prompts are neither sorted nor split."""
    lens = opened("qwen2_vl")
    padded = ARCHITECTURES["qwen2_vl"].padded
    assert padded is not None
    inputs = padded(lens.model, "right")  # type: ignore[arg-type]
    inputs = {
        name: value.flip(0) if name != "pixel_values" else value for name, value in inputs.items()
    }
    whole = lens.run(inputs, keep="pattern", layers="L1").pattern["L1"]
    first = lens.measure(inputs, al.FirstTokenMass(), layers="L1")["first_token"]["L1"]
    mask = inputs["attention_mask"]
    for prompt in range(2):
        real = mask[prompt].bool()
        wanted = whole[prompt][:, real][:, :, int(real.int().argmax())].mean(-1)
        torch.testing.assert_close(first[prompt], wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="cannot be told apart"):
        lens.measure(inputs, al.FirstTokenMass(), batch_size=1)


def test_nan_pixels() -> None:
    lens = opened("vit")
    pixels = ARCHITECTURES["vit"].inputs(lens.model)["pixel_values"]  # type: ignore[arg-type]
    pixels[0, 0, 1, 2] = float("nan")
    with pytest.raises(InputError, match="pixel_values holds NaN"):
        lens.run({"pixel_values": pixels})


NAMED: list[tuple[Callable[[Lens], Any], str]] = [
    (lambda lens: lens.run([20], heads="L0H9"), "'L0H9' names head 9 of L0"),
    (lambda lens: lens.run([20], layers="L7"), "'L7' names no layer"),
    (lambda lens: lens.run([20], layers=7), "no site 'L7'"),
    (lambda lens: lens.run([20], heads=[(0, 9)]), "(0, 9) names head 9"),
    (lambda lens: lens.run([20], heads="H3"), "Cannot read 'H3'"),
    (lambda lens: lens.run([20], heads="cross.L0H0"), "names no layer"),
    (lambda lens: lens.measure([20], al.Entropy(), layers="L2"), "names no layer"),
    (lambda lens: lens.weights("L5"), "no site 'L5'"),
    (lambda lens: lens.run([20]).pattern["L5"], "Nothing was kept at 'L5'"),
]


@pytest.mark.parametrize(("use", "words"), NAMED)
def test_unknown_heads_say_what_exists(lens: Lens, use: Callable[[Lens], Any], words: str) -> None:
    with pytest.raises(HeadError) as refused:
        use(lens)
    message = str(refused.value)
    assert words in message
    assert "L0..1 with 4 heads" in message or "there is L0, L1" in message


def test_no_head_in_common(lens: Lens) -> None:
    with pytest.raises(InputError, match="no head in common"):
        lens.run([20], layers="L0", heads="L1H0")


def test_what_was_not_kept_or_measured(lens: Lens) -> None:
    with pytest.raises(InputError, match=r"'q' was not kept.*keep=\('q'"):
        _ = lens.run([20], keep="z").q
    with pytest.raises(InputError, match="'sinks' was not measured; there is entropy"):
        _ = lens.measure([20], al.Entropy())["sinks"]


def test_over_budget(lens: Lens) -> None:
    with pytest.raises(BudgetError, match=r"lens\.measure"):
        lens.run([20] * 60, budget="1kB")
    with pytest.raises(InputError, match="Cannot read the budget 'much'"):
        lens.run([20], budget="much")


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("2GB", 2 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1.5kB", 1500),
        ("12", 12),
        (7, 7),
        (2e9, 2 * 10**9),
    ],
)
def test_budgets(written: str | int, count: int) -> None:
    assert parse_bytes(written) == count


@pytest.mark.parametrize("written", ["", "GB", "1.2.3GB", "-1GB", "2 lots"])
def test_budgets_that_cannot_be_read(written: str) -> None:
    with pytest.raises(InputError, match="budget"):
        parse_bytes(written)


def test_logits_at_the_asked_positions(lens: Lens) -> None:
    ids = torch.arange(20, 44).view(2, 12)
    with torch.no_grad():
        whole = lens.model(input_ids=ids).logits
    reads = torch.tensor([[3, 11], [0, 5]])
    found = lens.logits(ids, reads, batch_size=1)
    wanted = torch.stack([whole[0, [3, 11]], whole[1, [0, 5]]])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(lens.logits(ids, reads), wanted)


def test_a_trace_as_a_table(lens: Lens) -> None:
    trace = lens.run([20, 21, 22], keep="pattern", heads="L1H2,L1H0", rows=[2])
    table = trace.to_frame()
    assert list(table["head"].unique()) == [2, 0]
    assert len(table) == 2 * 1 * 3
    own = table[(table["head"] == 0) & (table["key"] == 1)].iloc[0]
    assert own["pattern"] == pytest.approx(float(trace.pattern["L1"][0, 1, 0, 1]))
    assert (own["query_token"], own["key_token"]) == ("22", "21")


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        (torch.tensor([[3], [-1]]), "holds -1; positions count from 0"),
        (torch.tensor([3, 11]), r"int64 \[2\]; give a tensor \[2, read\]"),
        (torch.tensor([[3], [1], [2]]), r"\[3, 1\]; give a tensor \[2, read\]"),
        (torch.tensor([[3.0], [1.0]]), "float32"),
        (torch.ones(2, 0, dtype=torch.long), r"\[2, 0\]"),
        ([[3], [1]], r"reads is \[\[3\], \[1\]\]"),
    ],
)
def test_reads_that_are_no_positions_are_refused(lens: Lens, reads: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lens.logits(torch.arange(20, 44).view(2, 12), reads)


@pytest.mark.parametrize("rows", [None, slice(-2, None)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_table_of_a_padded_prompt_is_that_of_the_prompt_alone(
    lens: Lens, side: str, rows: slice | None
) -> None:
    pad, real = ([0, 0], [20, 21, 22])
    parts = pad + real if side == "left" else real + pad
    inputs = {
        "input_ids": [parts, [20, 21, 22, 23, 24]],
        "attention_mask": [[int(part > 0) for part in parts], [1] * 5],
    }
    for kind in ("pattern", "scores"):
        alone = lens.run(real, keep=kind, rows=rows).to_frame(kind)
        padded = lens.run(inputs, keep=kind, rows=rows).to_frame(kind)
        values = padded.pop(kind), alone.pop(kind)
        assert padded.equals(alone)
        # float32 scores, up to some units, of rotary tables that begin elsewhere
        assert values[0].to_numpy() == pytest.approx(values[1].to_numpy(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_a_table_has_the_rows_and_keys_of_each_site(name: str) -> None:
    model = ARCHITECTURES[name].build()
    inputs = ARCHITECTURES[name].inputs(model)
    trace = Lens(model, example=inputs).run(inputs, keep="pattern")
    table = trace.to_frame(prompt=-1).set_index(["site", "head", "query", "key"])
    for site, pattern in trace.pattern.items():
        own = table.loc[site]["pattern"].to_numpy().reshape(pattern.shape[1:])
        assert (own == pattern[-1].numpy()).all()


def test_tables_that_cannot_be_made_are_refused(lens: Lens) -> None:
    trace = lens.run([20, 21, 22], keep=("pattern", "z"))
    with pytest.raises(InputError, match="no prompt 1; the run has 1"):
        trace.to_frame(prompt=1)
    with pytest.raises(InputError, match="not 'z'"):
        trace.to_frame("z")
    with pytest.raises(HeadError, match="Nothing was kept of stack 'enc'; there is L0, L1"):
        trace.pattern.stack("enc")
    model = ARCHITECTURES["swin"].build()
    inputs = ARCHITECTURES["swin"].inputs(model)
    pieces = Lens(model, example=inputs).run(inputs, keep="pattern")
    with pytest.raises(InputError, match="pieces"):
        pieces.to_frame()


def test_statistics_as_a_table(lens: Lens) -> None:
    statistics = lens.measure([20, 21, 22], [al.Entropy(), al.OffsetMass((0, 1)), al.ArgMax()])
    table = statistics.to_frame()
    columns = ["head", "site", "layer", "index", "entropy", "offset_0", "offset_1"]
    assert list(table.columns) == columns
    assert list(table["head"])[:2] == ["L0H0", "L0H1"]
    wanted = statistics["offset"]["L1"][0, 3, 1]
    assert table["offset_1"].iloc[7] == pytest.approx(float(wanted))
    assert statistics["entropy"].stack().shape == (1, 2, 4)


def test_bytes_are_no_token_ids_and_a_batch_has_a_prompt(lens: Lens) -> None:
    with pytest.raises(InputError, match="Cannot read bytes"):
        lens.encode(b"hello")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch_size=0"):
        lens.measure([20, 21], al.Entropy(), batch_size=0)


@pytest.mark.parametrize("name", ["roberta", "xlm_roberta", "bert"])
def test_left_padding_moves_no_position(name: str) -> None:
    lens = al.load(ARCHITECTURES[name].build(), check=False)
    ids = torch.arange(20, 29)[None]
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (3, 0), value=7),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 9]),
    }
    alone, beside = (lens.run(given, keep=("pattern",))["pattern"] for given in (ids, padded))
    for site in lens.anatomy.sites:  # RoBERTa's first position is not 0
        assert torch.allclose(beside[site.name][..., 3:, 3:], alone[site.name], atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_positions_with_three_coordinates_are_left_to_the_model(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    plain = dict(architecture.inputs(model))
    plain["attention_mask"] = torch.ones_like(plain["input_ids"])
    left = {
        key: torch.nn.functional.pad(value, (3, 0)) if value.shape[:2] == (2, 20) else value
        for key, value in plain.items()
    }
    lens = al.load(model, example=plain)
    with torch.no_grad():
        wanted = model(**plain).logits
        found = model(**lens.encode(left).inputs).logits[:, 3:]
    assert torch.allclose(found, wanted, atol=1e-4)  # of logits around 5; positions off: 2 to 4


@pytest.mark.parametrize("name", ["swin", "qwen2_vl"])
def test_sites_that_attend_in_pieces_of_prompts_are_refused(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    inputs = architecture.inputs(model)
    lens = al.load(model, example=inputs)
    with pytest.raises(InputError, match=r"attends in \d+ pieces where there are 2 prompts"):
        lens.measure(inputs, al.Entropy())
