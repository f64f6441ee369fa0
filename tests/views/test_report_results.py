"""Parts of a report: sentences and tables of results whose answers are known."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from attnlens.analyses.layer_similarity import layer_similarity
from attnlens.analyses.massive_activations import MassiveActivation, massive_activations
from attnlens.analyses.massive_qk import massive_qk
from attnlens.analyses.ranks import head_ranks
from attnlens.analyses.sinks import sinks
from attnlens.analyses.syntax import RelationHeads, SyntaxHeads, SyntaxSettings
from attnlens.analyses.uncertainty import Interval
from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.views.page import Page
from attnlens.views.report_lines import (
    massive_lines,
    qk_lines,
    rank_lines,
    retrieval_lines,
    syntax_lines,
)
from attnlens.views.report_parts import MOST_ROWS, Table, add_part, add_table, write_page
from attnlens.views.report_results import part_of
from tests.views.models import REPEATED, hand_wired
from tests.views.test_retrieval import found

INPUTS = [REPEATED, [0, 8, 4, 6, 2, 8, 4, 6, 2]]


def _scored(*scores: float):
    """The retrieval result with other scores of its heads, in their order."""
    result = found()
    score = torch.zeros(len(result.heads), dtype=result.mean.dtype)
    score[: len(scores)] = torch.tensor(scores, dtype=score.dtype)
    return replace(result, mean=torch.stack([score, score], -1))


def test_retrieval_heads_are_claimed_only_over_a_threshold():
    assert retrieval_lines(found()) == (
        "Needles: 6 of 6 runs count (recall over 0.5); mean recall 1.00.",
        "1 strong retrieval head (score over 0.5): L1H2 (1.00).",
    )
    assert retrieval_lines(_scored(0.5, 0.3))[1:] == (
        "No strong retrieval head: none scores over 0.5 (best L0H0, 0.50).",
        "2 weak retrieval heads (score over 0.1): L0H0 (0.50), L0H1 (0.30).",
    )
    assert retrieval_lines(_scored(0.1))[1:] == (
        "No strong retrieval head: none scores over 0.5 (best L0H0, 0.10).",
    )


def test_without_an_answer_no_score_is_shown():
    result = replace(
        found(), counted=torch.zeros_like(found().counted), notes=("0 of 6.", "It is mute.")
    )
    assert retrieval_lines(result)[-1] == "It is mute."
    part = part_of(result)
    assert part.tables["retrieval-heads"].shown is None
    assert "no run counts" in part.figures["retrieval"].caption
    assert part.notes == ()


def _syntax(*gains: float) -> SyntaxHeads:
    """Relations r0, r1, ... whose best head, L0H1, is better than the offset by so much."""

    def interval(value: float) -> Interval:
        return Interval(*(torch.tensor(value + end).double() for end in (0, -0.05, 0.05)))

    entries = [
        RelationHeads(
            f"r{number}", "to_head", 50,
            Interval(*(torch.tensor([0.1, 0.5 + gain]).double() for _ in range(3))),
            1, -2, interval(0.5), interval(gain),
        )
        for number, gain in enumerate(gains)
    ]  # fmt: skip
    return SyntaxHeads((Head("", 0, 0), Head("", 0, 1)), tuple(entries), 10, SyntaxSettings(), ())


def test_relations_are_told_of_only_where_the_head_clearly_beats_the_offset():
    first, *others = syntax_lines(_syntax(0.04, 0.1, 0.3))
    assert "in 2 of 3 pairs of relation and direction" in first
    assert [line.split(",")[0] for line in others] == ["r2", "r1"]
    assert others[0] == (
        "r2, to the head: L0H1 finds 80 % of 50 arcs (80 to 80 %); offset −2 finds 50 %."
    )


def test_massive_activations_are_told_with_their_place():
    nothing = massive_activations(hand_wired(), INPUTS)
    assert massive_lines(nothing)[0].startswith("No massive activation: no residual coordinate")
    one = MassiveActivation(0, 3, " <b>", "L1", 7, -2500.0)
    (line,) = massive_lines(replace(nothing, found=(one,)))
    assert line == (
        "Massive activations: 1 channel in 1 of 2 texts; the largest is −2500 in channel 7 of "
        "stream L1, at position 3 ('·<b>')."
    )


def test_massive_channels_are_counted_by_head():
    result = massive_qk(hand_wired(), INPUTS)
    mean = torch.zeros_like(result.mean)
    mean[2, result.names.index("query_peak")] = 8.0
    assert qk_lines(replace(result, mean=mean))[0].startswith(
        "No massive channel in queries (up to 8.00 times the median channel, L0H2) or keys (up to"
    )
    mean[2, result.names.index("query_massive")] = 1.0
    assert qk_lines(replace(result, mean=mean))[0].startswith(
        "Massive channels in queries of 1 head (up to 8.00 times the median channel, L0H2) and"
    )


def test_ranks_that_are_unknown_are_not_told():
    ranks = head_ranks(hand_wired())
    assert "W_Q W_K^T" in rank_lines(ranks)[0]
    unknown = torch.full_like(ranks.mean, torch.nan)
    assert rank_lines(replace(ranks, mean=unknown)) == ()


@pytest.mark.parametrize("analysis", [sinks, massive_activations, massive_qk, layer_similarity])
def test_parts_escape_tokens_and_name_their_files(analysis, tmp_path):
    part = part_of(analysis(hand_wired(), INPUTS))
    write_page(tmp_path, "<title>", "about", part.lines, [part])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<title>&lt;title&gt;</title>" in page
    for name in part.tables:
        assert (tmp_path / "tables" / f"{name}.parquet").is_file()
        assert f'href="tables/{name}.csv"' in page
    for name in part.figures:
        assert (tmp_path / "figures" / f"{name}.html").is_file()


def test_a_token_in_a_table_is_text():
    page = Page("t", "s")
    add_table(page, Table(pd.DataFrame({"token": ["<i> x"], "ok": [True]}), "tokens"))
    html = page.html()
    assert "&lt;i&gt;·x" in html
    assert "<td>yes</td>" in html


def test_a_long_table_is_shown_in_part():
    page = Page("t", "s")
    add_table(page, Table(pd.DataFrame({"position": range(MOST_ROWS + 5)}), "positions"))
    html = page.html()
    assert f"Positions (the first {MOST_ROWS} of {MOST_ROWS + 5})" in html
    assert html.count("<td") == MOST_ROWS


def test_a_part_without_rows_has_no_table():
    page = Page("t", "s")
    add_part(page, part_of(massive_activations(hand_wired(), INPUTS)))
    assert "Massive channels" not in page.html().split("</figure>")[-1]


def test_other_results_have_no_part():
    with pytest.raises(InputError, match="no part of a report of a int"):
        part_of(3)
