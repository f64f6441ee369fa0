"""HTML that escapes by itself: a plain string is text, only `Html` is markup."""

from __future__ import annotations

import html
import json

import plotly.graph_objects as go


class Html(str):
    """Finished markup."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | bool | None) -> Html:
    """One element; children that are not Html are escaped, so are attributes.

    `data_value="1"` gives data-value, `class_` gives class, True an attribute without a value, None
    and False none.
    """
    opening = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            opening.append(name)
        elif value is not None and value is not False:
            opening.append(f'{name}="{html.escape(value)}"')
    inside = "".join(text(child) for child in children)
    return Html(f"<{' '.join(opening)}>{inside}</{tag}>")


def text(content: str) -> Html:
    """Escaped, unless it is markup already."""
    return content if isinstance(content, Html) else Html(html.escape(content))


def joined(*parts: str) -> Html:
    """Several pieces after another."""
    return Html("".join(text(part) for part in parts))


def safe_json(source: str) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or the line."""
    for character in "<>&\u2028\u2029":
        source = source.replace(character, f"\\u{ord(character):04x}")
    return source


def figure_data(figure: go.Figure, name: str) -> Html:
    """A figure's JSON in a script element of its own that no browser runs."""
    content = safe_json(figure.to_json() or "{}")
    return Html(f'<script type="application/json" id="{html.escape(name)}">{content}</script>')


def script_value(value: object) -> str:
    """A value as JavaScript source."""
    return safe_json(json.dumps(value))
