"""Scores for the terminal: a table with bars, and the text in their colours."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnlens.views.theme import visible

BAR = 18
POSITIVE, NEGATIVE, PAPER = (224, 154, 118), (134, 174, 205), (246, 245, 240)
LONGEST = 400
"""Tokens of a text that is shown as a whole."""


def score_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], sizes: Sequence[float]
) -> Table:
    """Rows of finished cells, numbers at the right, with a bar for each row's size.

    The first two columns are a position and a token.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 1 else "right", no_wrap=True)
    table.add_column("")
    largest = max(map(abs, sizes), default=0.0) or 1.0
    for row, size in zip(rows, sizes, strict=True):
        bar = Text("\u2588" * round(abs(size) / largest * BAR))
        bar.stylize("dark_orange3" if size > 0 else "steel_blue3")
        table.add_row(*(Text(cell) for cell in row), bar)
    return table


def coloured(words: Sequence[str], scores: Sequence[float]) -> Text:
    """A text, each token on the colour of its score; line ends are kept."""
    largest = max(map(abs, scores), default=0.0) or 1.0
    text = Text()
    for word, score in zip(words, scores, strict=True):
        share, end = abs(score) / largest, POSITIVE if score > 0 else NEGATIVE
        mixed = (round(low + share * (high - low)) for low, high in zip(PAPER, end, strict=True))
        text.append(visible(word, 40), f"black on rgb({','.join(map(str, mixed))})")
        if word.endswith("\n"):
            text.append("\n")
    return text


def print_scores(words: Sequence[str], scores: Sequence[float], table: Table) -> None:
    """The coloured text where the terminal has colours, then the table."""
    console = Console(highlight=False)
    if console.is_terminal and console.color_system and len(words) <= LONGEST:
        console.print(coloured(words, scores))
    console.print(table)
