import numpy as np
import pytest
import torch

import attnlens as al
from attnlens.analyses.attention_flow import AttentionFlow
from attnlens.analyses.rollout import RolloutSettings
from attnlens.errors import InputError


def flow(targets: tuple[int, ...] = (0, 1, 2)) -> AttentionFlow:
    """A made-up result of one prompt whose tokens are markup; the first pair is saturated."""
    table = torch.tensor([[1.0, 0, 0], [0.6, 0.5, 0], [0.7, 0.2, 0.4]], dtype=torch.float64)
    high = torch.tensor([[1.0, 0, 0], [0.8, 0.7, 0], [0.9, 0.7, 0.6]], dtype=torch.float64)
    own = list(targets)
    return AttentionFlow(
        tokens=(("<b>", "cat & dog", "\n"),),
        targets=(targets,),
        sources=((0, 1, 2),),
        flow=table[None, own],
        rollout=table[None, own] / 2,
        bound=high[None, own],
        maps=torch.eye(3).expand(1, 2, 3, 3),
        layers=("L0", "L1"),
        settings=RolloutSettings(),
        skipped=torch.tensor([1]),
        notes=(),
    )


def test_all_targets_are_a_map_beside_rollout() -> None:
    figure = al.show(flow())
    maps = [np.array(trace.z) for trace in figure.data]
    assert maps[0][2].tolist() == pytest.approx([0.7, 0.2, 0.4])
    assert maps[1][2].tolist() == pytest.approx([0.35, 0.1, 0.2])
    assert np.isnan(maps[0][0, 1:]).all()  # no path leads there
    assert "1 of 6 pairs saturated" in figure.layout.title.text
    assert figure.layout.coloraxis2.cmax == 0.5
    told = figure.data[0].customdata[0][0]
    assert "&lt;b&gt;" in told
    assert "saturated" in told
    assert figure.layout.xaxis.ticktext[1].startswith("cat·&amp;·dog")


def test_one_target_is_bars_between_bounds() -> None:
    for figure in (al.show(flow(), target=-1), al.show(flow((2,)))):
        bars, high, low = figure.data
        assert list(bars.y) == [0.7, 0.2, 0.4]
        assert (high.name, list(high.y)) == ("upper bound", [0.9, 0.7, 0.6])
        assert (low.name, list(low.y)) == ("rollout", [0.35, 0.1, 0.2])
        assert "to “⏎” at 2" in figure.layout.title.text
    first = al.show(flow(), target=0)
    assert [trace.name.split(",")[0] for trace in first.data[:2]] == ["flow", "flow"]
    assert list(first.data[1].y) == [1.0]


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no flow to the target 3"):
        al.show(flow(), target=3)
    with pytest.raises(InputError, match=r"the targets are \(2,\)"):
        al.show(flow((2,)), target=0)
    with pytest.raises(InputError, match="no prompt 1"):
        al.show(flow(), prompt=1)
