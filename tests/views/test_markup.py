import json
import re

import plotly.graph_objects as go
import pytest

from attnlens.views.markup import Html, element, figure_data, joined, safe_json, text
from attnlens.views.page import Cell, Page, figure_page
from attnlens.views.theme import position_labels, token_label

HOSTILE = "</script><script>alert('x')</script>\u2028\u2029<img src=x onerror=alert(1)>&"


def test_plain_strings_are_escaped_and_markup_is_not():
    assert element("p", "<b>", Html("<i>y</i>"), title='"&') == (
        '<p title="&quot;&amp;">&lt;b&gt;<i>y</i></p>'
    )
    assert text("<") == "&lt;"
    assert joined("<", Html("<br>")) == "&lt;<br>"


def test_json_in_a_script_cannot_end_it_and_reads_back():
    source = json.dumps({"text": HOSTILE}, ensure_ascii=False)
    safe = safe_json(source)
    assert not re.search("[<>&\u2028\u2029]", safe)
    assert json.loads(safe)["text"] == HOSTILE


def test_figure_json_reads_back_whole():
    figure = go.Figure(go.Scatter(x=[1], y=[2], text=[HOSTILE]))
    content = figure_data(figure, "one")
    inside = content.removeprefix('<script type="application/json" id="one">')
    inside = inside.removesuffix("</script>")
    assert "<" not in inside
    assert json.loads(inside)["data"][0]["text"] == [HOSTILE]


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" the", "·the"),
        ("\n", "⏎"),
        ("\t", "\u2409"),
        ("", "∅"),
        ("<b>", "&lt;b&gt;"),
        ('"', '"'),  # plotly knows no &quot;
        ("\u202e", "\\u202e"),
        ("\ud800", "\\ud800"),
        ("internationalisation", "international…"),
    ],
)
def test_token_labels_show_what_cannot_be_seen(token, label):
    assert token_label(token) == label


def test_position_labels_are_all_different():
    labels = position_labels(["a", "a", "<"], 3)
    assert len(set(labels)) == 3
    assert "&lt;" in labels[2]
    assert position_labels(["a"], 2) == ["#0", "#1"]


def _page() -> str:
    page = Page(HOSTILE, HOSTILE)
    page.section(HOSTILE)
    page.prose(HOSTILE)
    page.points([HOSTILE])
    page.note(HOSTILE)
    page.table((HOSTILE,), [[Cell(HOSTILE, 0.5, 0.5)], [HOSTILE]], caption=HOSTILE)
    figure = go.Figure(go.Scatter(x=[1], y=[2], text=[HOSTILE]))
    page.figure(figure, HOSTILE)
    return page.html()


def test_hostile_text_stays_text_everywhere_on_a_page():
    page = _page()
    assert "<img" not in page.replace("<image", "")
    assert "alert('x')</script>" not in page
    assert "\u2028" not in page.split("</style>")[1].split("plotly.js")[0]


def test_a_page_asks_for_nothing_outside_itself():
    page = _page()
    assert page.count("plotly.js v") >= 1
    tags = re.findall(r"<(?:link|img|iframe|script)\b[^>]*>", page.split("<main")[1])
    assert all("src=" not in tag and "href=" not in tag for tag in tags)
    assert "default-src 'none'" in page
    assert not re.search(r"<script[^>]+src=", page)


def test_plotly_is_inlined_once():
    page = _page()
    assert page.count("* Copyright 2012-") == 1


def test_a_figure_page_reads_plotly_beside_it():
    page = figure_page(go.Figure(), "<title>", "plotly.min.js")
    assert '<script src="plotly.min.js"></script>' in page
    assert "&lt;title&gt;" in page
    assert len(page) < 50_000
