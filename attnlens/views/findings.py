"""What the main job finds out about a model, and the sentences that say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from attnlens.views.panels import number_text

if TYPE_CHECKING:
    from attnlens.analyses.ablation import Ablation
    from attnlens.analyses.head_types import HeadTypes
    from attnlens.analyses.profile import Profile
    from attnlens.analyses.rollout import Rollout
    from attnlens.analyses.sinks import Sinks
    from attnlens.anatomy import Anatomy
    from attnlens.hooks.check import Check
    from attnlens.lens.trace import Trace
