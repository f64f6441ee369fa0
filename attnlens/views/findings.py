"""What the main job finds out about a model, and the sentences that say it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from attnlens.analyses.ablation import Ablation
from attnlens.analyses.ablation_groups import SetAblation
from attnlens.analyses.head_types import HeadTypes
from attnlens.analyses.massive_qk import MassiveQK
from attnlens.analyses.profile import Profile
from attnlens.analyses.ranks import HeadRanks
from attnlens.analyses.retrieval import RetrievalHeads
from attnlens.analyses.rollout import Rollout
from attnlens.analyses.sinks import Sinks
from attnlens.anatomy import Anatomy
from attnlens.hooks.check import Check
from attnlens.lens.trace import Trace
from attnlens.views.narrative import check_line, model_line, type_lines
from attnlens.views.panels import PLACE
from attnlens.views.ranking import ablation_lines, together_line
from attnlens.views.report_parts import Part
from attnlens.views.report_results import part_of

# In a table of everything the names of a result's numbers have to say which result it is.
RENAMED = {
    f"{name}{end}": f"{new}{end}"
    for name, new in (("score", "retrieval"), ("active", "retrieval_active"))
    for end in ("", "_low", "_high")
}


@dataclass(frozen=True)
class Findings:
    """Everything that the main job found out; None where a part was left out."""

    model: str
    anatomy: Anatomy
    check: Check
    texts: tuple[str, ...] = ()
    """The texts that were read; the first ones where they were many."""
    profile: Profile | None = None
    sinks: Sinks | None = None
    types: HeadTypes | None = None
    trace: Trace | None = None
    rollout: Rollout | None = None
    repeated: Trace | None = None
    """Random tokens said twice, seen by the best induction head."""
    ablation: Ablation | None = None
    together: SetAblation | None = None
    """All induction heads ablated at once."""
    further: tuple[Any, ...] = ()
    """Other results, each of which makes a part of the report (`part_of`)."""
    left_out: tuple[str, ...] = ()
    """What was left out and why, a sentence each."""

    @cached_property
    def sink_part(self) -> Part | None:
        """What the report says of sinks."""
        return None if self.sinks is None else part_of(self.sinks)

    @cached_property
    def further_parts(self) -> tuple[Part, ...]:
        """What the report says of the other results."""
        return tuple(part_of(result) for result in self.further)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of these."""
        return (*filter(None, [self.sink_part]), *self.further_parts)

    @property
    def heads(self) -> pd.DataFrame:
        """One row a head: every number of every part that was made."""
        table = pd.DataFrame(
            {
                "head": [str(head) for head in self.anatomy.heads],
                "site": [head.site for head in self.anatomy.heads],
                "layer": [head.layer for head in self.anatomy.heads],
                "index": [head.head for head in self.anatomy.heads],
            }
        )
        more = [one for one in self.further if isinstance(one, MassiveQK | HeadRanks)]
        more += [one for one in self.further if isinstance(one, RetrievalHeads)]
        for result in (self.profile, self.sinks, self.types, *more, self.ablation):
            if result is not None:
                own = result.to_frame().drop(columns=list(PLACE[1:])).rename(columns=RENAMED)
                own = own[["head", *(name for name in own if name not in table)]]
                table = table.merge(own, on="head", how="left", sort=False)
        return table

    def lines(self) -> list[str]:
        """The findings in short, a sentence a line."""
        lines = [model_line(self.anatomy), check_line(self.check)]
        if self.types is not None:
            lines += type_lines(self.types)
        for part in self.parts:
            lines += part.lines
        if self.ablation is not None:
            lines += ablation_lines(self.ablation, self.anatomy.vocab)
        if self.together is not None:
            lines.append(together_line(self.together))
        return [*lines, *self.left_out]
