"""Specifications of heads: what they name, in which order, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlens.anatomy import Anatomy, Head, Site
from attnlens.errors import HeadError


def site(stack: str, layer: int, heads: int) -> Site:
    return Site(
        module=f"{stack or 'model'}.{layer}.attn",
        call=0,
        stack=stack,
        layer=layer,
        kind="self",
        heads=heads,
        groups=1,
        d_qk=4,
        d_v=4,
        causal=True,
        window=None,
        sinks=False,
        upcast=False,
        block=None,
        output=None,
    )


ANATOMY = Anatomy(
    model="Model",
    sites=(*(site("", layer, 3) for layer in range(4)), *(site("cross", n, 2) for n in range(2))),
    d_model=12,
    vocab=None,
    context=None,
    final_norm=None,
    unembedding=None,
    parameters=0,
)


def found(spec: Any) -> list[str]:
    return [str(head) for head in ANATOMY.find(spec)]


@pytest.mark.parametrize(
    ("spec", "heads"),
    [
        ("L3H2", "L3H2"),
        (" L0H1 , L1H2 ", "L0H1 L1H2"),
        ("L2", "L2H0 L2H1 L2H2"),
        ("L2:", "L2H0 L2H1 L2H2 L3H0 L3H1 L3H2"),
        ("L1:3H1", "L1H1 L2H1"),
        ("L2:H0", "L2H0 L3H0"),
        ("cross.L1", "cross.L1H0 cross.L1H1"),
        ("cross.L0:H1", "cross.L0H1 cross.L1H1"),
        ((1, 2), "L1H2"),
        ([(1, 2), (0, 0)], "L1H2 L0H0"),
        (["L0H0", Head("cross", 1, 1), (2, 2)], "L0H0 cross.L1H1 L2H2"),
        ("L1H1,L1,L1H1", "L1H1 L1H0 L1H2"),
        ([], ""),
    ],
)
def test_what_a_specification_names(spec: Any, heads: str) -> None:
    assert found(spec) == heads.split()


def test_all() -> None:
    assert ANATOMY.find("all") == ANATOMY.heads
    assert len(ANATOMY.heads) == 4 * 3 + 2 * 2


@given(st.lists(st.sampled_from(ANATOMY.heads), unique=True))
def test_a_head_prints_as_its_own_specification(heads: list[Head]) -> None:
    assert list(ANATOMY.find([str(head) for head in heads])) == heads
    if heads:
        assert list(ANATOMY.find(",".join(map(str, heads)))) == heads


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("L4", "'L4' names no layer"),
        ("L4:", "'L4:' names no layer"),
        ("L2:2", "'L2:2' names no layer"),
        ("L0H3", "head 3 of L0, which has heads 0 to 2"),
        ("L0:H3", "head 3 of L0"),
        ("dec.L0", "'dec.L0' names no layer"),
        ("cross.L0H2", "head 2 of cross.L0, which has heads 0 to 1"),
        ((9, 0), "(9, 0) names no layer"),
        ((0, -1), "(0, -1) names head -1"),
        (Head("", 0, 7), "names head 7"),
        ("", "Cannot read ''"),
        ("L0,", "Cannot read ''"),
        ("3.5", "Cannot read '3.5'"),
        ("L-1", "Cannot read 'L-1'"),
        ("l0h1", "Cannot read 'l0h1'"),
        ("L0H1H2", "Cannot read"),
    ],
)
def test_what_a_specification_cannot_name(spec: Any, words: str) -> None:
    with pytest.raises(HeadError) as refused:
        ANATOMY.find(spec)
    assert words in str(refused.value)
    assert "Model has L0..3 with 3 heads, cross.L0..1 with 2 heads." in str(refused.value)


@given(st.text(max_size=8))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        heads = ANATOMY.find(text)
    except HeadError:
        return
    assert set(heads) <= set(ANATOMY.heads)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (None, "L0 L1 L2 L3 cross.L0 cross.L1"),
        (2, "L2"),
        ([3, 0], "L3 L0"),
        ("L1:3", "L1 L2"),
        ("cross.L1,L0", "L0 cross.L1"),
        ([], ""),
    ],
)
def test_layers(spec: Any, names: str) -> None:
    assert [each.name for each in ANATOMY.layers(spec)] == names.split()


def test_a_site_by_name_or_number() -> None:
    assert ANATOMY["L2"] is ANATOMY[2] is ANATOMY.sites[2]
    assert ANATOMY["cross.L1"] is ANATOMY.sites[5]
    with pytest.raises(HeadError, match=r"no site 'L9'.*L0\.\.3"):
        _ = ANATOMY[9]


def test_what_is_not_seen_is_printed() -> None:
    hidden = Anatomy(**{**vars(ANATOMY), "unseen": ("text.0", "text.1", "text.2", "text.3")})
    assert str(hidden).endswith(
        "not seen, outside the attention interface: text.0, text.1, text.2, ..."
    )
