"""Where things are in a model: attention sites, heads and groups, views of their weights."""

from attnlens.anatomy.sites import Anatomy, Head, HeadSpec, Kind, Site

__all__ = ["Anatomy", "Head", "HeadSpec", "Kind", "Site"]
