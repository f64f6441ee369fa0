"""Heat maps over tokens: attention patterns of heads, and rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from attnlens.analyses.rollout import Rollout
from attnlens.anatomy import Head, HeadSpec, Site
from attnlens.errors import InputError
from attnlens.lens.trace import Trace
from attnlens.views.shown import show
from attnlens.views.theme import colour_axis, position_labels, styled

MOST_PANELS = 64
PANEL = 190

Map = Float[np.ndarray, "query key"]


@show.register
def show_trace(trace: Trace, heads: HeadSpec | None = None, prompt: int = 0) -> go.Figure:
    """Attention patterns of a run: one head large, several as small panels, layer by layer.

    `heads` is a specification (all kept heads for None), `prompt` a number. Raises InputError where
    no pattern was kept, or over 64 panels were asked for.
    """
    kept = [trace.anatomy[site].head(n) for site in trace.pattern for n in trace.heads[site]]
    asked = kept if heads is None else list(trace.anatomy.find(heads))
    missing = [str(head) for head in asked if head not in kept]
    if missing:
        raise InputError(
            f"The pattern of {', '.join(missing[:3])} was not kept in this run. Run again with "
            f'heads="{missing[0]}".'
        )
    if len(asked) > MOST_PANELS:
        raise InputError(
            f"{len(asked)} patterns do not fit into one figure (at most {MOST_PANELS}). Choose "
            f'heads, for example show(trace, "{asked[0].site}").'
        )
    check_prompt(prompt, len(trace.lengths))
    maps = {head: _pattern(trace, head, prompt) for head in asked}
    if len(asked) == 1:
        return _one(trace, asked[0], maps[asked[0]], prompt)
    return _panels(trace, maps, prompt)


@show.register
def show_rollout(rollout: Rollout, prompt: int = 0, layer: int = -1) -> go.Figure:
    """Attention rollout of one prompt after a layer of the rollout; -1 is the last."""
    check_prompt(prompt, len(rollout.tokens))
    if not -len(rollout.layers) <= layer < len(rollout.layers):
        raise InputError(f"There is no layer {layer}; the rollout has {', '.join(rollout.layers)}.")
    values = rollout.of(prompt)[layer].double().cpu().numpy()
    if not np.triu(values, 1).any():
        values = np.where(np.triu(np.ones_like(values), 1) > 0, np.nan, values)
    labels = position_labels(rollout.tokens[prompt], len(values))
    title = f"Attention rollout up to {rollout.layers[layer]}"
    return token_map(values, labels, labels, title, "share")


def check_prompt(prompt: int, count: int) -> None:
    """Raise InputError if there is no prompt of that number."""
    if not 0 <= prompt < count:
        raise InputError(f"There is no prompt {prompt}; there are {count}, counted from 0.")


def _pattern(trace: Trace, head: Head, prompt: int) -> Map:
    """One head's weights without padding; keys that the row cannot see are NaN."""
    site = trace.anatomy[head.site]
    number = trace.heads[head.site].index(head.head)
    weights = trace.pattern[head.site][prompt, number].double().cpu().numpy()
    if trace.tokens and _own_tokens(site):
        real = _real(trace, prompt)
        weights = weights[real if trace.rows is None else slice(None)][:, real]
    elif trace.tokens and site.kind == "cross":
        weights = weights[:, _real(trace, prompt)]
    if site.causal:
        rows = np.array(_rows(trace, prompt, weights.shape[0]))
        hidden = np.arange(weights.shape[1])[None] > rows[:, None]
        weights = np.where(hidden & (weights == 0), np.nan, weights)
    return weights


def _own_tokens(site: Site) -> bool:
    """Whether a site's rows and columns are the text's tokens."""
    return site.stack not in ("dec", "vision", "audio") and site.kind != "cross"


def _real(trace: Trace, prompt: int) -> list[int]:
    """Positions of a prompt's tokens in the padded text."""
    real = trace.sides.text.real
    if real is None:
        return list(range(trace.lengths[prompt]))
    return real[prompt].nonzero()[:, 0].tolist()


def _rows(trace: Trace, prompt: int, count: int | None = None) -> Sequence[int]:
    """Numbers of the kept rows among the prompt's tokens."""
    if trace.rows is not None:
        real = _real(trace, prompt) if trace.tokens else None
        return [row if real is None else real.index(row) for row in trace.rows[prompt]]
    return range(trace.lengths[prompt] if count is None else count)


def _labels(trace: Trace, head: Head, weights: Map, prompt: int) -> tuple[list[str], list[str]]:
    """Labels of the rows and of the columns."""
    site = trace.anatomy[head.site]
    tokens = trace.tokens[prompt] if trace.tokens else None
    own = tokens if _own_tokens(site) else None
    keys = position_labels(tokens if site.kind == "cross" else own, weights.shape[1])
    if own is None or site.kind == "cross":
        return position_labels(None, weights.shape[0]), keys
    rows = _rows(trace, prompt)
    full = position_labels(own, len(own))
    return [full[row] for row in rows], keys


def _one(trace: Trace, head: Head, weights: Map, prompt: int) -> go.Figure:
    queries, keys = _labels(trace, head, weights, prompt)
    return token_map(weights, queries, keys, f"Attention of {head}", "weight")


def token_map(
    values: Map, queries: Sequence[str], keys: Sequence[str], title: str, unit: str
) -> go.Figure:
    """One heat map with a label a row and a column; rows are queries, columns keys."""
    figure = go.Figure(_heat(values, queries, keys, unit))
    side = int(np.clip(16 * max(len(queries), 12) + 150, 320, 1000))
    styled(figure, title, side)
    figure.update_layout(coloraxis=colour_axis("sequential", 0, _high(values), unit))
    figure.update_xaxes(title="key", side="bottom", tickangle=-60, showgrid=False, ticks="")
    figure.update_yaxes(title="query", autorange="reversed", showgrid=False, ticks="")
    # Labels that plotly would thin out are all shown while they can be read.
    step = max(1, len(keys) // 56 + 1)
    figure.update_xaxes(tickvals=list(keys)[::step])
    figure.update_yaxes(tickvals=list(queries)[:: max(1, len(queries) // 56 + 1)])
    figure.update_layout(margin={"l": 110, "b": 100})
    return figure


def _panels(trace: Trace, maps: dict[Head, Map], prompt: int) -> go.Figure:
    heads = list(maps)
    sites = list(dict.fromkeys(head.site for head in heads))
    widest = max(sum(head.site == site for head in heads) for site in sites)
    columns = -(-widest // -(-widest // (8 if len(sites) > 1 else 4)))
    cells = [
        head
        for site in sites
        for head in _filled([head for head in heads if head.site == site], columns)
    ]
    rows = len(cells) // columns
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[str(head) if head else "" for head in cells],
        horizontal_spacing=0.02,
        vertical_spacing=min(0.09, 0.4 / rows),
    )
    for number, head in enumerate(cells):
        if head is None:
            continue
        queries, keys = _labels(trace, head, maps[head], prompt)
        heat = _heat(maps[head], queries, keys, "weight")
        figure.add_trace(heat, row=number // columns + 1, col=number % columns + 1)
    styled(figure, f"Attention of {', '.join(sites)}", rows * PANEL + 110)
    figure.update_xaxes(showticklabels=False, showgrid=False, ticks="")
    figure.update_yaxes(showticklabels=False, showgrid=False, ticks="", autorange="reversed")
    figure.update_annotations(font_size=12, yshift=-2)
    figure.update_layout(
        coloraxis=colour_axis("sequential", 0, 1, "weight"), margin={"l": 20, "b": 20}
    )
    return figure


def _filled(heads: Sequence[Head], columns: int) -> list[Head | None]:
    """The heads of a site in whole rows of panels."""
    return [*heads, *[None] * (-len(heads) % columns)]


def _heat(values: Map, queries: Sequence[str], keys: Sequence[str], unit: str) -> go.Heatmap:
    return go.Heatmap(
        z=values.astype(np.float32),
        x=list(keys),
        y=list(queries),
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertemplate=f"query %{{y}}<br>key %{{x}}<br>{unit} %{{z:.3f}}<extra></extra>",
    )


def _high(values: Map) -> float:
    """Top of the colour scale: 1, or less where no weight comes near."""
    top = float(np.nanmax(values)) if values.size and not np.isnan(values).all() else 1.0
    return 1.0 if top > 0.5 else max(top, 1e-6)
