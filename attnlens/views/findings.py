"""What the main job finds out about a model, and the sentences that say it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from attnlens.analyses.ablation import Ablation, SetAblation
from attnlens.analyses.head_types import HeadTypes
from attnlens.analyses.profile import Profile
from attnlens.analyses.rollout import Rollout
from attnlens.analyses.sinks import Sinks
from attnlens.anatomy import Anatomy
from attnlens.hooks.check import Check
from attnlens.lens.trace import Trace
from attnlens.views.narrative import check_line, model_line, sink_line, type_lines
from attnlens.views.panels import PLACE
from attnlens.views.ranking import ablation_lines, together_line


@dataclass(frozen=True)
class Findings:
    """Everything that the main job found out; None where a part was left out."""

    model: str
    anatomy: Anatomy
    check: Check
    texts: tuple[str, ...] = ()
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
    left_out: tuple[str, ...] = ()
    """What was left out and why, a sentence each."""

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
        for result in (self.profile, self.sinks, self.types, self.ablation):
            if result is not None:
                own = result.to_frame().drop(columns=list(PLACE[1:]))
                own = own[["head", *(name for name in own if name not in table)]]
                table = table.merge(own, on="head", how="left", sort=False)
        return table

    def lines(self) -> list[str]:
        """The findings in short, a sentence a line."""
        lines = [model_line(self.anatomy), check_line(self.check)]
        if self.types is not None:
            lines += type_lines(self.types)
        if self.sinks is not None:
            lines.append(sink_line(self.sinks))
        if self.ablation is not None:
            lines += ablation_lines(self.ablation, self.anatomy.vocab)
        if self.together is not None:
            lines.append(together_line(self.together))
        return [*lines, *self.left_out]
