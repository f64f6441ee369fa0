"""Figures of sweeps, on the hand-wired model: only L0H1 and L1H2 do anything."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import attnlens as al
from attnlens.errors import InputError
from attnlens.sweeps.modes import Mode
from attnlens.tasks import repeated_tokens
from attnlens.views import ablation, show
from attnlens.views.ablation_parts import INSTEAD
from attnlens.views.panels import RED
from attnlens.views.ranking import BETTER, METRICS, WORSE, effect_bars, show_ranking
from attnlens.views.report_parts import write_page
from attnlens.views.report_results import part_of
from tests.views.models import hand_wired

HEADS = "L0H0,L0H1,L1H2"
HOW = {"metric": "accuracy"}


@cache
def _task():
    return repeated_tokens(hand_wired(), 4)


@cache
def _heads():
    return al.ablate(hand_wired(), _task(), HEADS, **HOW)


@cache
def _groups():
    groups = {"idle": "L0H0,L1H0", "<circuit>": "L0H1,L1H2"}
    return al.ablate_groups(hand_wired(), _task(), groups, "mean", **HOW)


@cache
def _pairs():
    return al.ablate_pairs(hand_wired(), _task(), HEADS, **HOW)


@cache
def _positions():
    return al.ablate_positions(hand_wired(), _task(), HEADS, [3, -2], **HOW)


@cache
def _set():
    return al.ablate_together(hand_wired(), _task(), "L0H1,L1H2", **HOW)


@cache
def _edits():
    lists = {"<b>": (al.Zero("L0H1"), al.Scale("L1", 0.5)), "idle": al.Uniform("L0H0")}
    return al.try_edits(hand_wired(), _task(), lists, **HOW)


EVERY = (_heads, _groups, _pairs, _positions, _set, _edits)


@pytest.mark.parametrize("made", EVERY)
def test_titles_name_task_prompts_and_mode(made):
    result = made()
    title = show(result).layout.title.text
    assert title.endswith("on repeated tokens, 4 prompts")
    if hasattr(result, "mode"):
        assert title.startswith(f"{result.mode.value.capitalize()} ablation")


def test_groups_are_bars_in_their_order_with_intervals():
    result = _groups()
    (bars,) = show(result).data
    assert list(bars.y) == ["&lt;circuit&gt;", "idle"]  # the first on top
    assert list(bars.x) == pytest.approx([float(result.effect[1]), 0], abs=1e-6)
    ends = float(result.high[1] - result.effect[1]), float(result.effect[1] - result.low[1])
    assert (bars.error_x.array[0], bars.error_x.arrayminus[0]) == pytest.approx(ends)
    assert bars.marker.color == (WORSE, BETTER)
    assert bars.customdata[0].endswith("<br>L0H1, L1H2")


def test_groups_that_are_layers_are_called_so():
    layers = al.ablate_layers(hand_wired(), _task(), "L1", **HOW)
    assert show(layers).layout.title.text.startswith("Zero ablation of 1 layer on")
    assert show(_groups()).layout.title.text.startswith("Mean ablation of 2 groups on")
    assert part_of(layers).title == "Zero ablation of layers"


def test_edits_say_what_they_are_without_becoming_markup():
    (bars,) = show(_edits()).data
    assert list(bars.y) == ["idle", "&lt;b&gt;"]
    assert "Zero" in bars.customdata[1]
    assert "Scale" in bars.customdata[1]
    assert float(bars.x[1]) < -0.5


def test_a_set_stands_beside_its_random_sets():
    result = _set()
    own, others = show(result).data
    assert list(own.x) == [result.effect]
    assert list(others.x) == result.control.tolist() == [0.0] * len(result.control_sets)
    assert others.customdata[0] == ", ".join(map(str, result.control_sets[0]))


def test_the_interaction_of_the_circuit_is_what_one_does_for_both():
    result = _pairs()
    (heat,) = show(result).data
    values = np.array(heat.z, dtype=float)
    lost = float(result.single[1])
    assert values == pytest.approx(values.T)
    assert values[0] == pytest.approx([0, 0, 0], abs=1e-6)
    assert np.diag(values) == pytest.approx(result.single.tolist(), abs=1e-6)
    # both gone is hardly worse than one gone
    assert values[1, 2] == pytest.approx(-lost, abs=0.2)
    text = heat.customdata[1][2]
    assert text.startswith("<b>L0H1, L1H2</b> interaction 1.00<br>")
    assert "<br>both −1.00<br>" in text
    assert "<br>L0H1 by itself −" in text
    assert "<br>L1H2 by itself −" in text
    assert heat.customdata[2][2].startswith("<b>L1H2</b> by itself")
    axis = show(result).layout.coloraxis
    assert axis.cmin == -axis.cmax


def test_positions_are_labelled_with_escaped_tokens():
    result = replace(_positions(), tokens=("<i>", "\n"))
    figure = show(result)
    (heat,) = figure.data
    assert np.array(heat.z, dtype=float) == pytest.approx(result.effect.numpy(), abs=1e-6)
    assert list(heat.x) == ["&lt;i&gt;<sub> 3</sub>", "⏎<sub> -2</sub>"]
    assert list(heat.y) == ["L0H0", "L0H1", "L1H2"]
    assert heat.customdata[2][1].startswith("<b>L1H2</b> at ⏎<sub> -2</sub>: −0.091<br>")


def test_screening_sets_exact_effects_beside_the_estimates_of_all_heads():
    result = al.ablate_screened(hand_wired(), _task(), top=3, metric="loss")
    figure = show(result)
    grid, line, points = figure.data
    assert np.array(grid.z, dtype=float).ravel() == pytest.approx(result.estimate.numpy())
    assert list(points.text) == [str(head) for head in result.exact.heads]
    assert list(points.y) == pytest.approx(result.exact.effect.tolist())
    known = dict(zip(map(str, result.heads), result.estimate.tolist(), strict=True))
    assert list(points.x) == [known[name] for name in points.text]
    assert list(line.x) == list(line.y)
    assert "the 3 largest, exactly" in figure.layout.annotations[1].text


def test_what_is_missing_is_empty_and_counted():
    whole = _heads()
    ablated = whole.ablated.clone()
    ablated[2] = torch.nan
    effect = whole.effect.clone()
    effect[2] = torch.nan
    figure = show(replace(whole, ablated=ablated, effect=effect))
    assert figure.layout.title.text.endswith("4 prompts, 4 of 12 values missing")
    values = np.array(figure.data[0].z, dtype=float)
    assert np.isnan(values[1, 2])
    assert values[0, 1] < -0.5
    clean = whole.clean.clone()
    clean[3] = torch.nan
    part = part_of(replace(whole, clean=clean, ablated=ablated, effect=effect))
    assert part.lines[0].startswith("Task repeated tokens: accuracy 1.00")
    assert "3 of 4 prompts" in part.prose
    with pytest.raises(InputError, match="nothing to draw"):
        show(replace(_positions(), effect=torch.full_like(_positions().effect, torch.nan)))


@pytest.mark.parametrize("made", EVERY)
def test_every_part_says_that_the_circuit_matters(made):
    part = part_of(made())
    said = " ".join(part.lines[1:])
    assert any(name in said for name in ("L1H2", "L0H1", "<circuit>", "<b>", "the 2 heads at once"))
    assert "idle" not in said
    assert "L0H0" not in said
    assert len(part.figures) >= 1
    assert all(len(table.frame) for table in part.tables.values())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("made", [_heads, _pairs, _positions])
def test_red_is_worse_in_every_heat_map_as_in_the_bars(made, metric):
    figure = show(replace(made(), metric=metric))
    axis = figure.layout.coloraxis
    falls_are_red = METRICS[metric][2] < 0
    assert axis.colorscale[-1][1] == WORSE
    assert bool(axis.reversescale) == falls_are_red
    said = axis.colorbar.title.text or figure.layout.annotations[0].text
    assert said.endswith(RED)
    fall = [{"effect": -1.0, "effect_low": -1.0, "effect_high": -1.0}]
    bar = effect_bars(fall, ["x"], metric, "x").marker.color[0]
    assert bar == (WORSE if falls_are_red else BETTER)


def test_the_ranking_has_a_legend_of_its_colours_and_no_diamonds_without_controls():
    whole = _heads()
    shown = [trace.name for trace in show_ranking(whole).data if trace.showlegend is not False]
    assert shown == ["random other heads of the layer", "the task goes worse", "better"]
    alone = replace(whole, control=torch.full_like(whole.control, torch.nan))
    assert [trace.name for trace in show_ranking(alone).data][1:] == shown[1:]
    assert "diamonds" in part_of(whole).prose
    assert "diamonds" not in part_of(alone).prose


def test_estimates_of_another_metric_keep_their_own_unit_sign_and_no_line_of_agreement():
    result = al.ablate_screened(hand_wired(), _task(), top=3, metric="accuracy")
    assert result.estimated == "loss"
    figure = show(result)
    assert len(figure.data) == 2
    assert figure.layout.annotations[0].text == f"estimated change of loss (nats); {RED}"
    assert not figure.layout.coloraxis.reversescale
    assert figure.layout.xaxis2.title.text == "estimated change of loss (nats)"
    assert figure.layout.yaxis2.title.text == "exact change of accuracy"


@pytest.mark.parametrize("made", EVERY)
def test_parts_say_how_sure_intervals_are_and_what_guessing_gives(made):
    part = part_of(replace(made(), confidence=0.8))
    said = part.prose + "".join(drawn.caption for drawn in part.figures.values())
    assert "80 %" in said
    assert "95" not in said
    guessed = replace(made(), metric="loss", clean=torch.full((4,), 3.5))
    assert "guessing" in part_of(guessed, 32).lines[1]  # ln 32 = 3.47
    assert "guessing" not in part_of(guessed, 64).lines[1]


def test_intervals_that_miss_0_by_chance_are_counted():
    result = replace(_heads(), confidence=0.9)
    assert "Of 3 heads without any effect, about 0.15 would" in part_of(result).prose
    pairs = part_of(replace(_pairs(), confidence=0.9)).prose
    assert "Of 3 pairs without any effect, about 0.30 would have an interval clear of 0" in pairs
    one = replace(result, clean=result.clean[:1], ablated=result.ablated[:, :1])
    assert "by chance" not in part_of(one).prose


def test_costs_that_read_as_nothing_are_not_findings():
    tiny = torch.tensor([-4e-4, -4e-4, -0.02], dtype=torch.float64)
    part = part_of(replace(_heads(), effect=tiny, low=2 * tiny, high=tiny / 2))
    assert [line.split()[1] for line in part.lines[1:]] == ["L1H2"]
    none = part_of(replace(_heads(), effect=tiny / 100, low=tiny, high=tiny / 200))
    assert "no cost of 0.001 or more has an interval clear of 0" in none.lines[-1]


def test_hover_texts_of_large_maps_are_short(monkeypatch):
    """A page would hold a text for each of a million pairs."""
    monkeypatch.setattr(ablation, "TOLD", 8)
    (heat,) = show(_pairs()).data  # 9 cells
    assert heat.customdata is None
    assert heat.hovertemplate == "<b>%{y}</b>, %{x}: %{z:.3f}<extra></extra>"
    (heat,) = show(_positions()).data  # 6 cells
    assert len(heat.customdata) == 3


def test_names_cannot_become_markup_on_the_page(tmp_path):
    for number, made in enumerate((_groups, _edits)):
        part = part_of(made())
        folder = tmp_path / str(number)
        folder.mkdir()
        write_page(folder, part.title, "", part.lines, [part])
        page = (folder / "index.html").read_text(encoding="utf-8")
        text = page[page.index("<main") : page.index("</main>")]
        assert "<circuit>" not in text
        assert "<b>" not in text


def test_every_mode_is_explained():
    assert set(INSTEAD) == set(Mode)
