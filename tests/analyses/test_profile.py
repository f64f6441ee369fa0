from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.profile import is_punctuation, profile
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture


def test_even_attention_has_a_closed_form(even_lens: Lens) -> None:
    ids = torch.arange(1, 13).view(2, 6)
    found = profile(even_lens, ids)
    rows = torch.arange(1, 7).double()
    assert found.names == (
        "entropy",
        "distance",
        "offset_0",
        "offset_1",
        "offset_2",
        "first_token",
    )
    wanted = [rows.log().mean(), ((rows - 1) / 2).mean(), (1 / rows).mean(), (1 / rows[1:]).mean()]
    wanted += [(1 / rows[2:]).mean(), (1 / rows).mean()]
    assert torch.allclose(found.mean, torch.stack(wanted).expand_as(found.mean), atol=1e-6)
    assert torch.allclose(found.low, found.high, atol=1e-6)  # every prompt is alike


def test_against_the_patterns_themselves(random_lens: Lens, ids: Tensor) -> None:
    found = profile(random_lens, ids)
    pattern = random_lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2)
    entropy = torch.special.entr(pattern).sum(-1).mean((0, 2))
    assert torch.allclose(found["entropy"].mean, entropy, atol=1e-5)
    back = pattern.diagonal(-2, -2, -1).mean((0, 2))
    assert torch.allclose(found["offset_2"].mean, back, atol=1e-6)
    frame = found.to_frame()
    assert frame.columns[:7].tolist() == [
        "head",
        "site",
        "layer",
        "index",
        "entropy",
        "entropy_low",
        "entropy_high",
    ]
    assert (frame["entropy_low"] <= frame["entropy"]).all()
    with pytest.raises(InputError, match="There is no 'rank' here"):
        found["rank"]


def test_heads_that_see_both_sides_have_a_next_token() -> None:
    lens = architecture("bert")
    ids = torch.arange(5, 29).view(2, 12)
    found = profile(lens, ids)
    pattern = lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2)
    assert torch.allclose(
        found["offset_-1"].mean, pattern.diagonal(1, -2, -1).mean((0, 2)), atol=1e-6
    )
    assert "offset_2" not in found.names


def test_what_makes_no_sense_at_a_site_is_nan() -> None:
    lens = architecture("t5")
    inputs = {"input_ids": torch.arange(5, 29).view(2, 12)}
    inputs["decoder_input_ids"] = torch.arange(3, 13).view(2, 5)
    frame = profile(lens, inputs).to_frame().set_index("site")
    assert frame.loc["cross.L0", ["distance", "offset_1"]].isna().all(axis=None)
    assert frame.loc["cross.L0", ["entropy", "first_token"]].notna().all(axis=None)
    assert frame.loc["enc.L0", "offset_2"].isna().all()
    assert frame.loc["enc.L0", "offset_-1"].notna().all()
    assert frame.loc["dec.L0", "offset_-1"].isna().all()
    assert frame.loc["dec.L0", "offset_2"].notna().all()


def test_special_tokens_and_punctuation_of_a_real_tokenizer(shared_data: Path) -> None:
    lens = al.load(shared_data / "stories260K")
    texts = ["Once upon a time, there was a cat. It ran!", "Tom said: yes. Then, he slept."]
    found = profile(lens, texts)
    assert {"special", "punctuation"} <= set(found.names)
    trace = lens.run(texts, keep="pattern")
    wanted = torch.zeros(len(found.heads), dtype=torch.float64)
    for prompt, words in enumerate(trace.tokens):
        marks = [
            i
            for i, word in enumerate(words)
            if word.strip() and not word.strip().isalnum() and i > 0 and is_punctuation(word)
        ]
        assert len(marks) >= 3
        own = trace.pattern.stack()[prompt, :, :, : len(words)].flatten(0, 1)
        wanted += own[:, :, marks].sum(-1).mean(1).double() / 2
    assert torch.allclose(found["punctuation"].mean, wanted, atol=1e-5)
    assert torch.allclose(found["special"].mean, found["first_token"].mean, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "wanted"), [(".", True), (" ,", True), ("...", True), ("a.", False), (" ", False)]
)
def test_punctuation(text: str, wanted: bool) -> None:
    assert is_punctuation(text) == wanted


def test_images_have_a_profile_without_tokens() -> None:
    from tests.architectures import ARCHITECTURES

    vit = ARCHITECTURES["vit"]
    model = vit.build()
    found = profile(al.load(model), dict(vit.inputs(model)))
    assert found["entropy"].mean.isfinite().all()
    assert found["offset_1"].mean.isfinite().all()
