"""The drawing of routes holds their edges, once each, and nothing that tokens could inject."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from attnlens.analyses.routes import Routes, routes
from attnlens.errors import InputError
from attnlens.views import routes as view
from attnlens.views import show
from tests.analyses.conftest import architecture
from tests.views.models import hand_wired


@cache
def circuit() -> Routes:
    return routes(hand_wired(), [[0, 5, 9, 14, 7, 20, 3, 5, 9, 14, 7]])


def ends(trace) -> set[tuple[float, ...]]:
    """First and last point of every line of a trace."""
    lines, own = set(), []
    for x, y in zip([*trace.x, None], [*trace.y, None], strict=True):
        if x is None:
            if own:
                lines.add((*own[0], *own[-1]))
            own = []
        else:
            own.append((x, y))
    return lines


def test_lines_run_from_what_is_read_to_what_reads() -> None:
    figure = show(circuit())
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    drawn = set().union(*(ends(trace) for trace in lines if not trace.name))
    # L1H2 from 5 to the target; L0H1 from 4 to 5 and from 9 to 10; one sum a block, two levels.
    assert drawn == {(5, 2, 10, 4), (4, 0, 5, 2), (9, 0, 10, 2)}
    (stream,) = (trace for trace in lines if trace.name == "residual stream")
    assert ends(stream) == {(10, 2, 10, 4), (10, 0, 10, 2), (5, 0, 5, 2)}
    (hover,) = (
        trace for trace in figure.data if trace.customdata and "reads" in trace.customdata[0]
    )
    assert any("L1H2 0.250" in text for text in hover.customdata)
    assert max(hover.marker.color) == pytest.approx(1 / 3, abs=1e-4)
    assert "at 10" in figure.layout.title.text
    assert list(figure.layout.yaxis.ticktext) == ["L0", "L1", "out"]


def test_streams_that_are_reached_are_as_large_as_what_arrives() -> None:
    figure = show(circuit())
    (nodes,) = (t for t in figure.data if t.customdata and "arrives" in t.customdata[0])
    found = {(x, y): text for x, y, text in zip(nodes.x, nodes.y, nodes.customdata, strict=True)}
    assert set(found) == {(10, 4), (5, 2), (10, 2), (4, 0), (5, 0), (9, 0), (10, 0)}
    assert "25.0% arrives" in found[5, 2]
    assert "entering L1" in found[5, 2]


def test_blocks_of_two_sums_have_a_level_between_and_the_strongest_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.arange(5, 14)[None]
    found = routes(architecture("llama"), ids, threshold=0.0)
    monkeypatch.setattr(view, "MOST", 5)
    figure = show(found)
    drawn = [t for t in figure.data if t.mode == "lines" and not t.name]
    lines = set().union(*map(ends, drawn))
    assert len(lines) == 5
    assert all(above - below == 1 and below % 2 == 0 for _, below, _, above in lines)
    assert "the 5 strongest of" in figure.layout.annotations[0].text
    (mlp,) = (trace for trace in figure.data if trace.name == "MLP")
    frame = found.to_frame()
    rows = frame.loc[frame["kind"] == "mlp", ["layer", "query"]].itertuples(index=False)
    levels = {"L0": 1, "L1": 3}
    assert ends(mlp) == {(at, levels[name], at, levels[name] + 1) for name, at in rows}


def test_tokens_are_escaped_and_prompts_checked() -> None:
    words = ("<b>&", *circuit().tokens[0][1:10], "<i>\n")
    figure = show(replace(circuit(), tokens=(words,)))
    text = figure.to_json()
    assert "<i>" not in text.replace("\\u003c", "<")
    assert "&lt;b&gt;&amp;" in text.replace("\\u003c", "<").replace("\\u0026", "&")
    with pytest.raises(InputError, match="no prompt 1"):
        show(circuit(), prompt=1)
