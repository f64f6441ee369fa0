"""Maximum flow through a stack of maps: from a position above the last to one below the first.

Nodes are (l, position), l from 0 (the input) to L (the output); an edge runs from (l + 1, t) to
(l, s) with capacity `maps[l, t, s]`. Capacities are scaled to whole numbers of 2^-30 and solved by
scipy's Dinic, so that a flow is off by at most 2^-31 for each edge of its smallest cut (about 1e-9
in all). A pair is solved only where cheaper bounds leave its flow open.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from attnlens.errors import InputError

UNITS = 2**30
"""Units of flow to the whole row of a map: the largest power of two that scipy's int32 holds."""


@dataclass(frozen=True)
class Flows:
    """Flows of some pairs, and how many of them had to be solved."""

    flow: Float[np.ndarray, "target source"]
    solves: int
    """Runs of the solver."""
    skipped: int
    """Pairs that a path joins without a run of their own, because their bounds met."""


def max_flows(
    network: FlowNetwork, targets: Int[np.ndarray, " target"], sources: Int[np.ndarray, " source"]
) -> Flows:
    """Maximum flow of each pair, `low <= flow <= bound`.

    One layer: `maps[0, t, s]`; two: `sum_j min(maps[1, t, j], maps[0, j, s])`; else a solve a pair,
    where the bounds differ and nothing is known of an even spread (`evenly`).
    """
    pairs = np.ix_(targets, sources)
    low, high = network.low[pairs], network.bound[pairs]
    if len(network.maps) <= 2:
        return Flows(network.short(targets, sources), 0, int((high > 0).sum()))
    flow = high.copy()
    unknown = np.asarray(high - low > 1 / UNITS)
    solves = 0
    ends = len(targets) + len(sources)
    if unknown.sum() > 2 * ends and not network.causal:
        unknown &= ~network.evenly(targets, sources)
        solves = ends
    for row in np.flatnonzero(unknown.any(1)):
        columns = np.flatnonzero(unknown[row])
        flow[row, columns] = network.solve(int(targets[row]), sources[columns])
    counted = int(unknown.sum())
    return Flows(flow.clip(low, high), solves + counted, int((high > 0).sum()) - counted)


@dataclass(frozen=True)
class _Edges:
    """Some edges in the order of their upper ends, as the rows of a sparse matrix."""

    upper: Int[np.ndarray, " edge"]
    lower: Int[np.ndarray, " edge"]
    capacity: Int[np.ndarray, " edge"]
    nodes: int

    def where(self, kept: Bool[np.ndarray, " edge"]) -> _Edges:
        return _Edges(self.upper[kept], self.lower[kept], self.capacity[kept], self.nodes)

    def join(self, upper: np.ndarray, lower: np.ndarray, capacity: np.ndarray) -> _Edges:
        """With more edges."""
        joined = (
            np.concatenate([own, other])
            for own, other in zip(
                (self.upper, self.lower, self.capacity),
                np.broadcast_arrays(upper, lower, capacity),
                strict=True,
            )
        )
        upper, lower, capacity = joined
        order = np.lexsort((lower, upper))
        return _Edges(upper[order], lower[order], capacity[order], self.nodes)

    def maximum_flow(self, start: int, end: int) -> tuple[int, csr_array]:
        """The most that flows from a node to another, and what each edge then carries."""
        starts = np.zeros(self.nodes + 1, dtype=np.int32)
        starts[1:] = np.bincount(self.upper, minlength=self.nodes).cumsum()
        matrix = csr_array(
            (self.capacity.astype(np.int32), self.lower.astype(np.int32), starts),
            shape=(self.nodes, self.nodes),
        )
        found = maximum_flow(matrix, start, end, method="dinic")
        return int(found.flow_value), found.flow


class FlowNetwork:
    """The network of one prompt's maps, residual share included, and its flows.

    Raises:
        InputError: maps that are not `layer query key`, square, finite and at least 0.

    """

    def __init__(self, maps: Float[np.ndarray, "layer query key"]) -> None:
        if maps.ndim != 3 or maps.shape[1] != maps.shape[2] or not maps.size:
            raise InputError(
                f"The maps have shape {list(maps.shape)}; a flow needs [layer, query, key] with as "
                "many queries as keys."
            )
        if not np.isfinite(maps).all() or (maps < 0).any():
            raise InputError("A flow needs finite capacities of at least 0.")
        self.maps = maps.astype(np.float64)
        self.layers, self.length = maps.shape[:2]
        self.largest = max(1.0, float(self.maps.sum(-1).max()))
        # no flow is larger than its target's row, so int32 holds every sum that the solver makes
        self.scale = UNITS / self.largest
        self.causal = not np.triu(maps, 1).any()

    def node(self, layer: int, position: int) -> int:
        """Number of a node; layer 0 is the input."""
        return layer * self.length + position

    @cached_property
    def units(self) -> Int[np.ndarray, "layer query key"]:
        """Capacities as whole numbers."""
        return np.rint(self.maps * self.scale).astype(np.int64)

    @cached_property
    def rollout(self) -> Float[np.ndarray, "target source"]:
        """Product of the maps: a feasible flow where rows sum to 1 at most."""
        product = self.maps[0]
        for layer in self.maps[1:]:
            product = layer @ product
        return product

    @property
    def low(self) -> Float[np.ndarray, "target source"]:
        """A feasible flow: rollout, thinned where rows sum to more than 1."""
        return self.rollout / self.largest ** (self.layers - 1)

    @cached_property
    def below(self) -> Bool[np.ndarray, "layer position source"]:
        """Whether a path leads from each node down to each source."""
        return _joined([np.eye(self.length, dtype=bool), *(self.maps > 0)])

    @cached_property
    def above(self) -> Bool[np.ndarray, "layer position target"]:
        """Whether a path leads from each target down to each node."""
        downwards = [np.eye(self.length, dtype=bool), *(self.maps[::-1] > 0).swapaxes(1, 2)]
        return _joined(downwards)[::-1]

    @cached_property
    def bound(self) -> Float[np.ndarray, "target source"]:
        """The smaller of a target's row and a source's column, as far as paths join the two."""
        row = self.maps[-1] @ self.below[-2]
        column = self.above[1].T @ self.maps[0]
        # sums in another order differ by rounding, and a feasible flow is below both
        return np.minimum(row, column).clip(self.low)

    def short(self, targets: np.ndarray, sources: np.ndarray) -> Float[np.ndarray, "target source"]:
        """The flow through one layer or two: `sum_j min(maps[1, t, j], maps[0, j, s])`."""
        first = self.maps[0][:, sources]
        if self.layers == 1:
            return first[targets]
        return np.stack([np.minimum(self.maps[1][t][:, None], first).sum(0) for t in targets])

    def solve(self, target: int, sources: Int[np.ndarray, " source"]) -> Float[np.ndarray, " s"]:
        """One solve for each source of a target."""
        edges = self._from(target)
        start = self.node(self.layers, target)
        found = [self._to(edges, s).maximum_flow(start, self.node(0, s))[0] for s in sources]
        return np.array(found) / self.scale

    def carried(self, target: int, source: int) -> Float[np.ndarray, "layer query key"]:
        """What each edge carries in a maximum flow, one of many as a rule."""
        edges = self._to(self._from(target), source)
        start, end = self.node(self.layers, target), self.node(0, source)
        carried = edges.maximum_flow(start, end)[1]
        upper = np.repeat(np.arange(edges.nodes), np.diff(carried.indptr))
        lower, units = carried.indices, np.asarray(carried.data, dtype=np.float64)
        down = units > 0  # the same, negative, runs up
        layer, key = np.divmod(lower[down], self.length)
        found = np.zeros_like(self.maps)
        found[layer, upper[down] % self.length, key] = units[down] / self.scale
        return found.clip(max=self.maps)

    def evenly(
        self, targets: Int[np.ndarray, " target"], sources: Int[np.ndarray, " source"]
    ) -> Bool[np.ndarray, "target source"]:
        """Pairs that are saturated because all can be spread evenly: a solve a target and a source.

        If a target can spread its row evenly over the positions of the middle layer, and a source
        can gather its column evenly from there, the smaller of both flows between the two.
        """
        middle = self.layers // 2
        above = self._edges.where(self._edges.lower >= self.node(middle, 0))
        below = self._edges.where(self._edges.upper < self.node(middle + 1, 0))
        rows, columns = self.units[-1].sum(1), self.units[0].sum(0)
        column = np.minimum(columns[sources], rows[targets].max())
        spread = np.stack([self._spread(above, middle, t, int(rows[t])) for t in targets])
        gathered = [
            self._gathered(below, middle, s, int(sum))
            for s, sum in zip(sources, column, strict=True)
        ]
        carried = [np.minimum(row, np.stack(gathered)).sum(1) for row in spread]
        return np.stack(carried) == np.minimum(rows[targets][:, None], columns[sources])

    def _spread(self, edges: _Edges, middle: int, target: int, units: int) -> np.ndarray:
        """What a target sends to each position of the middle layer, no more than an even share."""
        nodes = self.node(middle, 0) + np.arange(self.length)
        joined = edges.join(nodes, np.array(edges.nodes - 1), self._shares(units))
        flow = joined.maximum_flow(self.node(self.layers, target), edges.nodes - 1)[1]
        return -self._last_row(flow, nodes)

    def _gathered(self, edges: _Edges, middle: int, source: int, units: int) -> np.ndarray:
        """What a source gets of each position of the middle layer, no more than an even share."""
        nodes = self.node(middle, 0) + np.arange(self.length)
        joined = edges.join(np.array(edges.nodes - 1), nodes, self._shares(units))
        flow = joined.maximum_flow(edges.nodes - 1, self.node(0, source))[1]
        return self._last_row(flow, nodes)

    def _last_row(self, flow: csr_array, nodes: np.ndarray) -> Int[np.ndarray, " position"]:
        """What flows from the last node to others."""
        begin, end = flow.indptr[-2:]
        row = np.zeros(nodes[-1] + 1, dtype=np.int64)
        row[flow.indices[begin:end]] = flow.data[begin:end]
        return row[nodes]

    def _shares(self, units: int) -> Int[np.ndarray, " position"]:
        """Units dealt out one by one, so that more units give no position less."""
        return units // self.length + (np.arange(self.length) < units % self.length)

    @cached_property
    def _edges(self) -> _Edges:
        """All edges, upper ends in order; the last node is free for what joins them."""
        layer, query, key = self.units.nonzero()
        upper, lower = (layer + 1) * self.length + query, layer * self.length + key
        nodes = (self.layers + 1) * self.length + 1
        return _Edges(upper, lower, self.units[layer, query, key], nodes)

    def _from(self, target: int) -> _Edges:
        """The edges that a target reaches."""
        reached = np.append(self.above[:, :, target].ravel(), False)
        return self._edges.where(reached[self._edges.upper])

    def _to(self, edges: _Edges, source: int) -> _Edges:
        """Those of the edges that lead to a source."""
        leads = np.append(self.below[:, :, source].ravel(), False)
        return edges.where(leads[edges.lower])


def _joined(steps: list[np.ndarray]) -> Bool[np.ndarray, "layer position end"]:
    """Whether paths exist through the first steps, for each number of them."""
    found = [steps[0]]
    for step in steps[1:]:
        found.append((step.astype(np.float32) @ found[-1].astype(np.float32)) > 0)
    return np.stack(found)
