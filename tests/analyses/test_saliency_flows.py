"""Saliency flows against loops over dense maps, and on circuits whose flow is known."""

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.attention_gradient import attention_saliency
from attnlens.analyses.saliency_flows import saliency_flows
from attnlens.analyses.target import Target
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.test_attention_gradient import opened, padded, tolerance

COPIES = [[0, 5, 9, 3, 7, 5, 9, 3], [0, 6, 2, 4, 8, 6, 2, 4]]


def by_hand(
    lens: Lens,
    inputs: dict[str, Tensor],
    groups: dict[str, list[list[int]]],
    flows: list[tuple[str, str]],
) -> Tensor:
    """Means edge by edge over the maps that `attention_saliency` keeps, `prompt flow layer`."""
    found = attention_saliency(lens, inputs, 5, maps=True)
    pattern = lens.run(inputs, keep="pattern").pattern
    assert found.maps is not None
    real = inputs["attention_mask"].bool()
    means = torch.zeros(len(real), len(flows) + 1, len(found.maps), dtype=torch.float64)
    for layer, (name, edges) in enumerate(found.maps.items()):
        for prompt in range(len(real)):
            places = real[prompt].nonzero()[:, 0].tolist()
            own = {group: [places[p] for p in each[prompt]] for group, each in groups.items()}
            own["text"] = places
            own.setdefault("target", places[-1:])
            sums: dict[int, list[float]] = {number: [] for number in range(len(flows) + 1)}
            for t in places:
                for s in places:
                    if s == t or (pattern[name][prompt, :, t, s] == 0).all():
                        continue
                    value = float(edges[prompt, :, t, s].sum())
                    mine = [n for n, (a, b) in enumerate(flows) if s in own[a] and t in own[b]]
                    for number in mine or [len(flows)]:
                        sums[number].append(value)
            for number, values in sums.items():
                means[prompt, number, layer] = sum(values) / len(values) if values else torch.nan
    return means


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss", "bert"])
def test_means_are_those_of_a_loop_over_edges(name: str, side: str) -> None:
    lens = opened(name)
    inputs = padded(lens, name, side)
    groups = {"labels": [[1, 6], [2, 5]], "other": [[3], [0, 2]]}
    flows = [("text", "labels"), ("labels", "target"), ("other", "labels"), ("text", "target")]
    found = saliency_flows(lens, inputs, 5, groups, flows)
    wanted = by_hand(lens, inputs, groups, flows)
    close = torch.isclose(found.by_prompt, wanted, atol=tolerance(name), rtol=1e-4, equal_nan=True)
    assert close.all()
    assert torch.equal(found.by_prompt.isnan(), wanted.isnan())
    assert torch.allclose(found.mean, wanted.nanmean(0), rtol=1e-4, equal_nan=True)
    assert found.flows[2:] == ("other to labels", "text to target", "everything else")
    assert found.groups["target"] == ((15,), (9,))
    one = saliency_flows(lens, inputs, 5, groups, flows, batch_size=1)
    assert torch.allclose(one.by_prompt, found.by_prompt, rtol=1e-4, equal_nan=True)


def test_a_window_lets_no_edge_of_a_far_flow_be_seen() -> None:
    lens = opened("gemma2")  # L0 sees the 5 last tokens, L1 all
    found = saliency_flows(lens, padded(lens, "gemma2", "right"), 5, {"labels": [1]})
    assert found.layers == ("L0", "L1")
    assert found.mean[1].isnan().tolist() == [True, False]


def test_label_words_gather_and_then_hand_on(induction_lens: Lens) -> None:
    # START a b c d | a b c: L0H1 moves c into d's place, L1H2 fetches d from there.
    found = saliency_flows(induction_lens, COPIES, Target([7, 8]), {"labels": 4})
    text, labels, rest = found.mean
    assert text[0] > 0.9
    assert text[1] < 1e-6
    assert labels[0] < 1e-6
    assert labels[1] > 10
    assert rest[1] < 1e-6
    frame = found.to_frame().set_index(["flow", "layer"])
    assert frame.loc[("labels to target", "L1"), "saliency"] == float(labels[1])
    assert (found.low <= found.mean).all()
    assert (found.mean <= found.high).all()
    assert found.target == ("'7'", "'8'")
    assert found.notes == ()
    alone = saliency_flows(induction_lens, COPIES[:1], 7, {"labels": [-4]})
    assert torch.allclose(alone.mean, found.by_prompt[0])
    assert alone.low.isnan().all()
    assert "One prompt" in alone.notes[0]


def test_heads_and_layers_are_chosen(induction_lens: Lens) -> None:
    found = saliency_flows(
        induction_lens, COPIES, Target([7, 8]), {"labels": 4}, layers="L1", heads="L1H0,L1H1"
    )
    assert found.layers == ("L1",)
    assert (found.mean == 0).all()
    assert found.settings == {"layers": "L1", "heads": "L1H0,L1H1"}


def test_a_stack_of_an_encoder_decoder() -> None:
    lens = opened("t5")
    inputs = padded(lens, "t5", "left")
    found = saliency_flows(lens, inputs, 5, {"labels": 2}, layers="dec.L0:")
    assert found.groups["target"] == ((11,), (6,))
    given = {"labels": 2, "target": [5, 6]}
    encoder = saliency_flows(lens, inputs, 5, given, layers="enc.L0:")
    assert encoder.groups["target"] == ((5, 6), (5, 6))
    assert (encoder.mean > 0).all()
    with pytest.raises(InputError, match=r"several stacks.*dec\.L0"):
        saliency_flows(lens, inputs, 5, {"labels": 2})
    with pytest.raises(InputError, match="group named 'target'"):
        saliency_flows(lens, inputs, 5, {"labels": 2}, layers="enc.L0:")


def test_bad_groups_are_named(random_lens: Lens, ids: Tensor) -> None:
    with pytest.raises(InputError, match=r"'label'.*labels, target, text"):
        saliency_flows(random_lens, ids, 5, {"labels": 3}, flows=[("text", "label")])
    with pytest.raises(InputError, match=r"\[12\] in prompt 0, which has 12 tokens"):
        saliency_flows(random_lens, ids, 5, {"labels": 12})
    with pytest.raises(InputError, match=r"\[-13\] in prompt 1"):
        saliency_flows(random_lens, ids, 5, {"labels": [[0], [-13]]}, batch_size=1)
    with pytest.raises(InputError, match="1 entries for 2 prompts"):
        saliency_flows(random_lens, ids, 5, {"labels": [[1, 2]]})
    with pytest.raises(InputError, match="no positions"):
        saliency_flows(random_lens, ids, 5, {"labels": [[1], []]})
    with pytest.raises(InputError, match="every token already"):
        saliency_flows(random_lens, ids, 5, {"text": [1]})
    with pytest.raises(InputError, match="no flow"):
        saliency_flows(random_lens, ids, 5, {"labels": [1]}, flows=[])
    with pytest.raises(InputError, match="confidence"):
        al.saliency_flows(random_lens, ids, 5, {"labels": [1]}, confidence=2)
