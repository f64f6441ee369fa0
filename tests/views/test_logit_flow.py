"""The figure of logit flow says what the result says."""

import pytest
import torch

import attnlens as al
from attnlens.errors import InputError
from tests.analyses.conftest import tiny_gpt2


def test_bars_add_up_to_the_logit() -> None:
    ids = torch.randint(1, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    found = al.logit_flow(al.load(tiny_gpt2()), ids, (3, 5))
    figure = al.show(found, prompt=1)
    layers = [trace for trace in figure.data if trace.type == "bar" and trace.xaxis == "x"]
    value = float(found.value[1])
    assert sum(sum(trace.x) for trace in layers) == pytest.approx(value)
    line = next(trace for trace in figure.data if trace.type == "scatter")
    assert line.x[-1] == pytest.approx(value)
    assert list(line.y)[:4] == ["embeddings", "L0", "L1", "L2"]
    largest = next(trace for trace in figure.data if trace.xaxis == "x3")
    sizes = [abs(share) for share in largest.x]
    assert sizes == sorted(sizes)
    assert sizes[-1] == pytest.approx(float(found.shares[1].abs().max()))
    with pytest.raises(InputError, match="no prompt 2"):
        al.show(found, prompt=2)


def test_names_of_targets_are_escaped() -> None:
    ids = torch.randint(1, 40, (1, 8), generator=torch.Generator().manual_seed(0))

    def named(output: object) -> torch.Tensor:
        return output.logits[:, -1, 3]

    named.__name__ = "<b>bold</b>"
    figure = al.show(al.logit_flow(al.load(tiny_gpt2()), ids, named))
    assert "<b>" not in figure.layout.title.text
