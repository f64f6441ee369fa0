"""Groups and a plane from a matrix of squared distances: linkage, silhouette, classical scaling."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform

Matrix = Float[np.ndarray, "item item"]
MOST = 12
"""Clusters that are tried where their number is not given."""


class Tree(NamedTuple):
    """A hierarchical clustering and one cut of it."""

    merges: Float[np.ndarray, "merge 4"]
    """scipy's linkage matrix: the two that merge, at which distance, items within."""
    order: Int[np.ndarray, " item"]
    """Leaves in an order that puts neighbours side by side."""
    labels: Int[np.ndarray, " item"]
    """Cluster of each item, numbered from 0 along the order."""
    silhouette: Float[np.ndarray, " item"]
    """-1 to 1 an item: how much nearer it is to its own cluster than to the next."""


def tree(distance: Matrix, method: str, clusters: int | None) -> Tree:
    """Cluster items by their distances; without a number, by the cut of best mean silhouette."""
    merges = linkage(squareform(distance, checks=False), method, optimal_ordering=True)
    order = leaves_list(merges)
    counts = range(2, min(MOST, len(distance) - 1) + 1) if clusters is None else (clusters,)
    cuts = [_numbered(fcluster(merges, count, "maxclust"), order) for count in counts]
    cuts = cuts or [np.zeros(len(distance), dtype=np.int64)]
    scores = [silhouette(distance, cut) for cut in cuts]
    best = int(np.argmax([float(score.mean()) for score in scores]))
    return Tree(merges, order, cuts[best], scores[best])


def silhouette(distance: Matrix, labels: Int[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
    """`(b - a) / max(a, b)`: mean distance a to the own cluster's others, b to the nearest other's.

    0 for an item alone in its cluster, and for all where there is one cluster. Rousseeuw 1987.
    """
    member = (labels[:, None] == np.unique(labels)).astype(float)
    sizes = member.sum(0)
    if len(sizes) < 2:
        return np.zeros(len(labels))
    sums = distance @ member
    own = member.astype(bool)
    mine = sizes[own.argmax(1)]
    within = sums[own] / np.maximum(mine - 1, 1)
    nearest = np.where(own, np.inf, sums / sizes).min(1)
    scale = np.maximum(within, nearest)
    score = np.divide(nearest - within, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.where(mine > 1, score, 0.0)


def plane(
    squared: Matrix, axes: int = 2
) -> tuple[Float[np.ndarray, "item axis"], Float[np.ndarray, " axis"]]:
    """Classical scaling: points whose squared distances are nearest to `squared`, and their shares.

    Eigenvectors of `-1/2 C squared C` with C the centring; a share is an axis' part of the sum of
    all positive eigenvalues. Each axis points so that its largest coordinate is positive.
    Torgerson 1952.
    """
    centred = squared - squared.mean(0)
    centred = -0.5 * (centred - centred.mean(1, keepdims=True))
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    total = values.clip(0).sum()
    values, vectors = values[::-1][:axes].clip(0), vectors[:, ::-1][:, :axes]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    points = vectors * np.where(largest < 0, -1, 1) * np.sqrt(values)
    return points, values / total if total > 0 else np.zeros(len(values))


def _numbered(labels: Int[np.ndarray, " item"], order: Int[np.ndarray, " item"]) -> np.ndarray:
    """The same clusters numbered from 0 in the order in which they come."""
    seen = {int(label): number for number, label in enumerate(dict.fromkeys(labels[order]))}
    return np.array([seen[int(label)] for label in labels])
