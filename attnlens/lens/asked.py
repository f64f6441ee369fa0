"""Reading what is asked of a run: heads by site, statistics by name, bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from attnlens.anatomy import Anatomy, HeadSpec, Site
from attnlens.errors import InputError, SeamError
from attnlens.hooks.edits import Editor
from attnlens.hooks.reducers import Reducer
from attnlens.hooks.restart import Recording


def choose(
    anatomy: Anatomy, layers: HeadSpec | int | None, heads: HeadSpec | None
) -> dict[str, tuple[int, ...]]:
    """Heads by site, for the sites of both specifications."""
    sites: Sequence[Site] = anatomy.layers(layers)
    names = {site.name for site in sites}
    if heads is None:
        return {site.name: tuple(range(site.heads)) for site in sites}
    chosen: dict[str, list[int]] = {}
    for head in anatomy.find(heads):
        if head.site in names:
            chosen.setdefault(head.site, []).append(head.head)
    if not chosen:
        raise InputError(f"heads={heads!r} and layers={layers!r} have no head in common.")
    return {name: tuple(numbers) for name, numbers in chosen.items()}


Maps = HeadSpec | int | bool | None
"""Layers whose attention edges a result keeps: True for all that are chosen, None for none."""


def choose_maps(
    anatomy: Anatomy, chosen: Mapping[str, tuple[int, ...]], maps: Maps
) -> dict[str, tuple[int, ...]]:
    """The chosen heads by site, of the layers whose maps are kept."""
    if maps is None or maps is False:
        return {}
    names = set(chosen) if maps is True else {site.name for site in anatomy.layers(maps)}
    kept = {name: heads for name, heads in chosen.items() if name in names}
    if not kept:
        raise InputError(f"maps={maps!r} names none of the layers chosen: {', '.join(chosen)}.")
    return kept


def check_prompts(results: Mapping[str, Mapping[str, Tensor]], prompts: int) -> None:
    """Raise where a site's first axis is not the prompts: its rows belong to pieces of them."""
    for tensors in results.values():
        for site, tensor in tensors.items():
            if tensor.shape[0] != prompts:
                raise InputError(
                    f"{site} attends in {tensor.shape[0]} pieces where there are {prompts} prompts "
                    "(windows of an image, or all images in one row), so its statistics cannot be "
                    "told apart by prompt. Name the layers of another stack: layers=..."
                )


def check_edits(
    editors: Iterable[Editor], anatomy: Anatomy, recording: Recording, site: Site
) -> None:
    """Raise where an edit is on at what a forward that goes on from a site does not compute."""
    for editor in editors:
        places = [("head", name) for name in sorted(editor.sites)]
        for what, name in [*places, *editor.stream_places]:
            own = anatomy[name]
            if recording.skips(site.name, own.block if what == "mlp" else own.module):
                raise SeamError(
                    f"An edit is on at {name}, and a forward that goes on from {site.name} does "
                    f"not compute it. Go on from {name}, or leave the edit out."
                )


def check_names(reducers: Sequence[Reducer]) -> None:
    """Raise InputError where two reducers have one name."""
    names = [reducer.name for reducer in reducers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise InputError(
            f"Two reducers are named {twice[0]!r}; give one another name=..."
            if twice
            else "No reducer was given."
        )


def parse_bytes(budget: str | float) -> int:
    """`"2GB"`, `"500 MB"` or a number of bytes."""
    if isinstance(budget, int | float):
        return int(budget)
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kMGT]?)B?\s*", budget)
    if found is None:
        raise InputError(f"Cannot read the budget {budget!r}. Write '2GB' or '500MB'.")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))
