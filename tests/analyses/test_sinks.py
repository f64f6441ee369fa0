import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.sinks import SinkSettings, sinks
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2

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


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="'paper' or 'code'"):
        SinkSettings(rule="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="epsilon=0"):
        SinkSettings(epsilon=0.0)
