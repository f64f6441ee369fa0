"""The result of any stored sweep, finished or not, without the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnlens.analyses.ablation import Ablation, heads_result
from attnlens.analyses.ablation_groups import (
    GroupAblation,
    SetAblation,
    groups_result,
    set_result,
)
from attnlens.analyses.ablation_pairs import PairAblation, pairs_result
from attnlens.analyses.ablation_positions import PositionAblation, positions_result
from attnlens.analyses.asked import Asked, missing_note
from attnlens.analyses.edit_effects import EditEffects, edits_result
from attnlens.analyses.patching import Patching, patching_result
from attnlens.analyses.path_patching import PathEffects, paths_result
from attnlens.errors import FileError
from attnlens.sweeps.run import Values
from attnlens.sweeps.store import Store

Swept = (
    Ablation
    | SetAblation
    | GroupAblation
    | PairAblation
    | PositionAblation
    | EditEffects
    | Patching
    | PathEffects
)
_MAKERS: Mapping[str, Callable[..., Any]] = {
    "heads": heads_result,
    "a set": set_result,
    "groups": groups_result,
    "pairs": pairs_result,
    "positions": positions_result,
    "edits": edits_result,
    "patching": patching_result,
    "paths": paths_result,
}


def stored_ablation(folder: str | Path) -> Swept:
    """What the sweep in a store found so far, as the function that began it returns it.

    Where values are missing a note says how many; prompts without one are left out of the means.

    Raises:
        FileError: there is no store, or it is damaged or of a kind without a result.

    """
    store = Store.open(folder)
    facts = store.manifest.settings
    kind = facts.get("kind")
    make = _MAKERS.get(str(kind))
    if make is None:
        raise FileError(
            f"{folder} holds a sweep of {kind or 'edits'}, of which there is no result: read its "
            "table with sweeps.store.Store.open(folder).table()."
        )
    grid = store.values()
    values = Values.of(grid, store.notes)
    found: Swept = make(Asked.of(store.manifest), facts, values)
    return replace(found, notes=(*missing_note(values), *found.notes))
