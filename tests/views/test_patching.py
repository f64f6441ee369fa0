"""Figures of activation patching, on the hand-wired model: only L0H1 and L1H2 do anything."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import attnlens as al
from attnlens.errors import InputError
from attnlens.tasks import repeated_tokens
from attnlens.views import show
from attnlens.views.ablation_parts import part_of
from attnlens.views.patching import BLUE
from attnlens.views.ranking import BETTER, WORSE
from attnlens.views.report_parts import write_page
from tests.sweeps.naive import lens_of, task_of
from tests.views.models import hand_wired

HOW = {"metric": "logit_difference"}


@cache
def _task():
    return repeated_tokens(hand_wired(), 4)


@cache
def _heads(direction="denoise"):
    return al.patch(hand_wired(), _task(), "z", direction=direction, **HOW)


@cache
def _layers(direction="denoise"):
    return al.patch(hand_wired(), _task(), "residual", direction=direction, **HOW)


@cache
def _positions():
    return al.patch(hand_wired(), _task(), "z", "L0H1,L1H2", (3, -2), **HOW)


EVERY = (_heads, _layers, _positions)


@pytest.mark.parametrize("made", EVERY)
def test_titles_name_kind_direction_and_task(made):
    result = made()
    title = show(result).layout.title.text
    assert title == f"Patching {result.kind} (denoise) on repeated tokens, 4 prompts"


def test_heads_are_a_grid_of_layers_and_heads():
    result = _heads()
    figure = show(result)
    (heat,) = figure.data
    assert list(heat.y) == ["L0", "L1"]
    assert list(heat.x) == ["H0", "H1", "H2", "H3"]
    values = np.array(heat.z, dtype=float)
    assert values.ravel() == pytest.approx(result.share.numpy(), abs=1e-6)
    assert heat.customdata[1][2].startswith("<b>L1H2</b>: recovery 1.00<br>interval ")
    assert "change of logit difference (logits)" in heat.customdata[1][2]
    effects = np.array(show(result, "effect").data[0].z, dtype=float)
    assert effects.ravel() == pytest.approx(result.effect.numpy(), abs=1e-5)


def test_blue_is_towards_clean_in_both_directions():
    for direction, turned in (("denoise", True), ("noise", False)):
        axis = show(_heads(direction)).layout.coloraxis
        assert bool(axis.reversescale) == turned
        assert axis.cmin == -axis.cmax
        assert axis.colorbar.title.text.endswith(BLUE)
        (bars,) = show(_layers(direction)).data
        assert bars.marker.color == ((BETTER if turned else WORSE),) * 2
    assert "share lost" in show(_heads("noise")).layout.coloraxis.colorbar.title.text
    # An effect has the colours of all effects: red is worse.
    assert show(_heads("noise"), "effect").layout.coloraxis.reversescale


def test_heads_that_share_keys_are_one_cell_and_heads_not_patched_none():
    lens = lens_of("llama")
    result = al.patch(lens, task_of(lens, (9, 9)), "k", "L0,L1H0")
    (heat,) = show(result).data
    assert list(heat.x) == ["H0-1", "H2-3"]
    values = np.array(heat.z, dtype=float)
    assert np.isnan(values).tolist() == [[False, False], [False, True]]


def test_layers_are_bars_with_the_first_on_top():
    result = _layers()
    (bars,) = show(result).data
    assert list(bars.y) == ["L1", "L0"]
    assert list(bars.x) == pytest.approx(result.share.flip(0).tolist())


def test_positions_are_labelled_with_escaped_tokens():
    result = replace(_positions(), tokens=("<i>", "\n"))
    (heat,) = show(result).data
    assert list(heat.x) == ["&lt;i&gt;<sub> 3</sub>", "⏎<sub> -2</sub>"]
    assert list(heat.y) == ["L0H1", "L1H2"]
    assert np.array(heat.z, dtype=float) == pytest.approx(result.share.numpy(), abs=1e-6)
    assert heat.customdata[0][0].startswith("<b>L0H1</b> at &lt;i&gt;<sub> 3</sub>: recovery ")


def test_where_no_share_is_known_effects_are_drawn():
    result = _heads()
    none = replace(result, share=torch.full_like(result.share, torch.nan))
    values = np.array(show(none).data[0].z, dtype=float)
    assert values.ravel() == pytest.approx(result.effect.numpy(), abs=1e-5)
    with pytest.raises(InputError, match="choose share or effect"):
        show(result, "recovery")
    with pytest.raises(InputError, match="nothing to draw"):
        show(none, "share")


@pytest.mark.parametrize("made", EVERY)
def test_parts_say_what_carries_the_answer(made, tmp_path):
    result = made()
    part = part_of(result, 32)
    said = " ".join(part.lines[1:])
    assert "recovery" in said
    assert "L0H0" not in said
    assert "95 %" in part.prose
    assert "corrupt prompts are given the" in part.prose
    write_page(tmp_path, part.title, "", part.lines, [part])
    assert (tmp_path / "index.html").is_file()


def test_shares_that_read_as_nothing_are_not_findings():
    whole = _heads()
    tiny = torch.full_like(whole.share, 2e-4)
    part = part_of(replace(whole, share=tiny, share_low=tiny, share_high=tiny))
    assert part.lines[-1] == "No recovery of 0.001 or more has an interval clear of 0."
