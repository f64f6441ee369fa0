import random

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.commonest import Commonest
from attnlens.analyses.sinks import SinkSettings, sinks
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.analyses.test_streaming import words_tokenizer
from tests.architectures import ARCHITECTURES

HARMONIC = [sum(1 / i for i in range(1, n + 1)) for n in range(13)]


def by_hand(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_k and the share of all rows, of one causal pattern `head query key`."""
    length = pattern.shape[-1]
    seen = torch.arange(length, 0, -1)
    return pattern.sum(1) / seen, pattern.sum(1) / length


def test_even_attention_has_a_closed_form(even_lens: Lens, ids: Tensor) -> None:
    found = sinks(even_lens, ids)
    length = ids.shape[1]
    for key in range(length):
        wanted = (HARMONIC[length] - HARMONIC[key]) / (length - key)
        assert torch.allclose(found.column_mass[:, key], torch.tensor(wanted).double())
        share = (HARMONIC[length] - HARMONIC[key]) / length
        assert torch.allclose(found.share[:, key], torch.tensor(share).double())
    assert torch.allclose(found.first_token.mean, torch.tensor(HARMONIC[12] / 12).double())
    assert (found.sink_rate == 0).all()
    assert float(found.first_token_all.mean) == pytest.approx(HARMONIC[12] / 12)


def test_random_attention_against_its_own_patterns(random_lens: Lens, ids: Tensor) -> None:
    found = sinks(random_lens, ids, SinkSettings(epsilon=0.2, rule="code"))
    patterns = random_lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2)
    alpha, share = (torch.stack(part) for part in zip(*map(by_hand, patterns), strict=True))
    assert torch.allclose(found.column_mass, alpha.mean(0), atol=1e-6)
    assert torch.allclose(found.sink_rate, (alpha > 0.2).double().mean(0))
    assert torch.allclose(found.rate.mean, (alpha > 0.2).double().mean((0, 1)))
    assert 0 < float(found.rate.mean.max()) < 1
    assert (found.learned == 0).all()
    over = {(s.prompt, found.heads.index(s.head), s.position) for s in found.calibration}
    assert over == set(map(tuple, (share > 0.1).nonzero().tolist()))
    assert list(found.calibration) == sorted(found.calibration, key=lambda s: -s.share)


def test_the_start_token_is_the_sink_of_the_induction_head(induction_lens: Lens) -> None:
    prompt = [
        [0, *torch.randperm(31, generator=torch.Generator().manual_seed(s)).add(1).tolist()]
        for s in range(4)
    ]
    found = sinks(induction_lens, prompt)
    sink = found.heads.index(induction_lens.anatomy.find("L1H2")[0])
    assert float(found.first_token.mean[sink]) > 0.999
    assert found.strongest[sink] == 0
    assert found.token_at(0) == "0"
    frame = found.to_frame().set_index("head")
    assert frame.loc["L1H2", "sink_rate"] == 1
    assert frame.drop("L1H2")["sink_rate"].max() == 0
    assert found.by_layer().set_index("site").loc["L1", "sink_rate"] == 0.25
    assert found.by_position().loc[0, "sink_rate"] == pytest.approx(1 / 8)
    assert {(s.prompt, s.position, str(s.head)) for s in found.calibration if s.share > 0.9} == {
        (p, 0, "L1H2") for p in range(4)
    }


def test_a_sink_at_a_later_token_is_found_there() -> None:
    model = tiny_gpt2(sharp=0.0)
    head, token, direction = 2, 7, 5
    with torch.no_grad():  # token 7 alone has this direction, and head 2 of layer 0 keys on it
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight[:, direction] = 0
        model.transformer.wte.weight[token, direction] = 50
        attention = model.transformer.h[0].attn
        attention.c_attn.bias[head * 8] = 20.0
        attention.c_attn.weight[direction, 32 + head * 8] = 20.0
    ids = [[1, 2, 3, 7, 4, 5, 6, 8], [9, 3, 7, 2, 4, 5, 6, 8]]
    found = sinks(al.load(model), ids, SinkSettings(rule="paper"))
    planted = [(s.prompt, s.position, s.token) for s in found.calibration if str(s.head) == "L0H2"]
    assert sorted(planted) == [(1, 2, "7")]  # 6 rows of 8 pass 5 / 8, and 5 of 8 do not
    rates = found.sink_rate[found.heads.index(found.heads[head])]
    assert rates[[2, 3]].tolist() == [0.5, 0.5]
    assert found.strongest[head] == 2
    code = sinks(al.load(model), ids, SinkSettings(rule="code"))
    planted = [(s.prompt, s.position) for s in code.calibration if str(s.head) == "L0H2"]
    assert {(0, 3), (1, 2)} <= set(planted)


def test_learned_sinks_take_what_no_key_gets() -> None:
    lens = architecture("gpt_oss")
    ids = torch.arange(5, 29).view(2, 12)
    found = sinks(lens, ids)
    rows = lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2).sum(-1).mean((0, 2))
    assert torch.allclose(found.learned, 1 - rows, atol=1e-6)
    assert torch.allclose(found.share.sum(-1), rows, atol=1e-6)
    assert rows.max() < 0.999
    assert any("Learned sinks" in note for note in found.notes)


@pytest.mark.usefixtures("small_blocks")
def test_the_share_counts_rows_that_cannot_see_a_key() -> None:
    lens = architecture("gpt_oss")
    ids = torch.arange(5, 29).view(2, 12)
    patterns = lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2)
    assert torch.allclose(sinks(lens, ids).share, patterns.mean((0, 2)), atol=1e-6)


def test_padding_on_either_side_gives_the_same(random_lens: Lens) -> None:
    real = torch.ones(2, 10, dtype=torch.long)
    real[1, 6:] = 0
    ids = torch.arange(1, 21).view(2, 10)
    moved = torch.cat([ids[:1], ids[1:].roll(4, dims=1)])
    right = sinks(random_lens, {"input_ids": ids, "attention_mask": real})
    left = sinks(random_lens, {"input_ids": moved, "attention_mask": real.flip(1)})
    assert torch.allclose(right.column_mass, left.column_mass, atol=1e-6)
    assert torch.allclose(right.first_token.low, left.first_token.low, atol=1e-6)
    assert right.prompts == left.prompts == (2, 2, 2, 2, 2, 2, 1, 1, 1, 1)
    assert right.tokens == left.tokens


def test_cross_attention_keys_are_the_encoders_text() -> None:
    lens = architecture("t5")
    inputs = {"input_ids": torch.arange(5, 29).view(2, 12)}
    inputs["decoder_input_ids"] = torch.arange(3, 9).view(2, 3)
    found = sinks(lens, inputs)
    assert found.share.shape == (len(lens.anatomy.heads), 12)
    cross = [i for i, head in enumerate(found.heads) if head.stack == "cross"]
    assert torch.allclose(found.share[cross].sum(-1), torch.ones(len(cross)).double(), atol=1e-6)
    decoder = [i for i, head in enumerate(found.heads) if head.stack == "dec"]
    assert found.share[decoder, 3:].isnan().all()


def test_a_decoder_s_own_keys_are_not_named_by_the_encoder_s_text() -> None:
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[8, 9]])}
    found = sinks(architecture("bart"), ids)
    frame = found.to_frame()
    own = frame["head"].str.startswith("dec.")
    assert own.any()
    assert set(frame["strongest_token"][own]) == {""}
    assert set(frame["strongest_token"][~own]) <= {"5", "6", "7"}
    layers = found.by_layer()
    assert set(layers["strongest_token"][layers["site"].str.startswith("dec.")]) == {""}


def test_one_text_has_no_interval_and_says_so(even_lens: Lens, ids: Tensor) -> None:
    assert any("no interval" in note for note in sinks(even_lens, ids[:1]).notes)
    assert not any("no interval" in note for note in sinks(even_lens, ids).notes)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="'paper' or 'code'"):
        SinkSettings(rule="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="epsilon=0"):
        SinkSettings(epsilon=0.0)
    with pytest.raises(InputError, match="most=0"):
        SinkSettings(most=0)


def test_a_planted_sink_draws_attention_wherever_it_stands_in_a_stream() -> None:
    model = tiny_gpt2(sharp=0.0)
    head, token, direction = 2, 7, 5
    with torch.no_grad():  # as above, but head 2 gives all its weight to word 7
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight[:, direction] = 0
        model.transformer.wte.weight[token, direction] = 50
        attention = model.transformer.h[0].attn
        attention.c_attn.bias[head * 8] = 20.0
        attention.c_attn.weight[direction, 32 + head * 8] = 20.0
    lens = al.load(model, tokenizer=words_tokenizer())
    places = [1 + number % 8 for number in range(200)]
    texts = (" ".join("w7" if k == place else "w9" for k in range(1, 10)) for place in places)
    found = sinks(lens, texts, SinkSettings(layers="L0", most=25))
    assert found.prompts == (200,) * 11
    planted = torch.tensor([places.count(k) / 200 for k in range(11)]).double()
    assert torch.equal(found.sink_rate[head, 1:9], planted[1:9])
    once = [" ".join("w7" if k == place else "w9" for k in range(1, 10)) for place in range(1, 9)]
    pattern = lens.run(once, keep="pattern", layers="L0").pattern.stack()[:, 0]  # 25 times each
    assert torch.allclose(found.share, pattern.mean((0, 2)), atol=1e-6)
    for place in range(1, 9):
        assert pattern[place - 1, head, place:, place].min() > 0.999
    # 11 - place rows of 11 have to be more than 5 / S = 5 / 11: the word at 1 to 5.
    planted = (pattern.mean(2)[:, head, 1:] > 5 / 11 + 1e-6).nonzero().tolist()
    assert planted == [[place - 1, place - 1] for place in range(1, 6)]
    assert found.calibration_total == 25 * int((pattern.mean(2) > 5 / 11 + 1e-6).sum())
    assert len(found.calibration) == 25
    assert [s.prompt for s in found.calibration] == [8 * i for i in range(25)]  # the word at 1
    assert {(s.token, s.position, str(s.head)) for s in found.calibration} == {("w7", 1, "L0H2")}
    assert found.token_at(0) == "<s>"
    assert [found.token_at(k) for k in (1, 5, 10)] == ["w9", "w9", "<e>"]


def test_learned_sinks_are_reported_in_a_stream_and_nothing_renormalised() -> None:
    lens = al.load(ARCHITECTURES["gpt_oss"].build().double(), tokenizer=words_tokenizer())
    texts = [" ".join(["w7", "w8", ".", "w9"][: 1 + i % 4]) for i in range(30)]
    found = sinks(lens, iter(texts), batch_size=2)
    sums = torch.zeros(len(found.heads), dtype=torch.float64)
    for text in texts:
        pattern = lens.run(text, keep="pattern").pattern.stack().flatten(1, 2)[0]
        sums += pattern.sum(-1).mean(-1) / len(texts)
    assert torch.allclose(found.learned, 1 - sums, atol=1e-6)
    assert sums.max() < 0.999
    assert any("Learned sinks" in note for note in found.notes)


@pytest.mark.parametrize("slots", [4, 50])
def test_the_commonest_token_of_a_position(slots: int) -> None:
    rng = random.Random(0)
    rows = [[rng.choice([5, 5, 5, 6, 7, 8, 9]) for _ in range(rng.randint(1, 6))]
            for _ in range(400)]  # fmt: skip
    counter = Commonest(slots)
    for row in rows:
        counter.add(row)
    # In 3 of 7 texts, and the others are in 1 of 7 and counted too high by 1 in 4 at most.
    assert counter.ids() == [5] * 6
    assert sum(tensor.numel() for tensor in counter.tensors().values()) == 2 * 6 * slots
    few = Commonest(slots)
    for row in ([4, 1], [3, 2, 9], [3, 1]):
        few.add(row)
    assert few.ids() == [3, 1, 9]
    few.add([4])
    assert few.ids()[0] == 4  # of two that are as common the first met
    assert Commonest().ids() == []
