"""Path patching along direct edges alone: what a sender wrote, as the receivers read it themselves.

`in_v = in_v(x) + s(x') - s(x)` for each receiver v, by the model's own norms and projections; MLPs
between the two see nothing of it. It is the run in which the edges from the sender to the receivers
are cut and all others kept (see `hooks/edge_run.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnlens.analyses.edge_runs import EdgeRuns, Progress
from attnlens.analyses.path_ends import End
from attnlens.anatomy.network import Network
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.sweeps.run import Values
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task


def direct_values(
    lens: Lens,
    task: Task,
    senders: Sequence[End],
    receivers: Sequence[End],
    metric: str | None,
    settings: SweepSettings,
    progress: Progress | None,
) -> Values:
    """The metric with the edges from each sender to the receivers cut, and last with all cut.

    Raises:
        InputError: a store or a cluster is asked for, which the other form has.
        UnsupportedModelError: a model whose edges are not defined.

    """
    if settings.store is not None or settings.ray is not None:
        raise InputError(
            'form="direct" runs in memory on this machine; leave store and ray out, or take '
            'form="frozen".'
        )
    runs = EdgeRuns(lens, task, metric, batch_size=settings.batch_size)
    network = runs.network
    columns = _receiving(network, receivers)
    cut = [_cut(network, sender, columns) for sender in senders]
    values = runs.run([network.exists, *cut, torch.zeros_like(network.exists)], progress)
    return Values(values[0], values[1:], ())


def _receiving(network: Network, receivers: Sequence[End]) -> list[int]:
    """Numbers of the network's inputs that some receivers are."""
    found: list[int] = []
    for number, own in enumerate(network.receivers):
        for end in receivers:
            node = str(end.head) if end.head is not None else end.name
            named = node in own.nodes
            if named and (end.head is None or own.kind in end.inputs):
                found.append(number)
                break
    return found


def _cut(network: Network, sender: End, columns: Sequence[int]) -> Tensor:
    """All edges but those from one sender to the receivers."""
    kept = network.exists.clone()
    rows = [number for number, own in enumerate(network.senders) if own.name == sender.name]
    if not rows:
        raise InputError(
            f"{sender.name} is no node of this model's network ({', '.join(network.nodes[:4])}, "
            "...), so it has no edges."
        )
    kept[torch.tensor(rows)[:, None], torch.tensor(columns)] = False
    return kept
