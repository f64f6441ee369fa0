"""Figures of results (`show`), and pages that open offline."""

from attnlens.views.shown import show

__all__ = ["show"]
