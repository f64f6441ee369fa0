"""A trial that kills the process which makes its edits: an accident at a known moment."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from attnlens.hooks.edits import Edit, Zero
from attnlens.lens import Lens
from attnlens.sweeps.trials import Trial


@dataclass(frozen=True)
class Deadly:
    """Edits that kill so many processes, each of which leaves its number behind; never this one."""

    graves: Path
    kills: int
    here: int

    def __call__(self, lens: Lens, prompts: slice) -> list[Edit]:
        if os.getpid() != self.here and self.dead < self.kills:
            (self.graves / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [Zero("L1H0")]

    @property
    def dead(self) -> int:
        return len(list(self.graves.iterdir()))


def deadly(graves: Path, kills: int) -> Trial:
    graves.mkdir()
    return Trial("deadly", Deadly(graves, kills, os.getpid()), {"zero": "L1H0"})
