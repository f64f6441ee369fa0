"""Composition scores: how much of what one head writes another is built to read, from weights.

Elhage et al. 2021, A mathematical framework for transformer circuits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.anatomy import Head, HeadSpec
from attnlens.anatomy.rotary import Rotary
from attnlens.anatomy.weights import HeadWeights
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.examples import example_inputs
from attnlens.hooks.folded import SiteNorms, find_norms
from attnlens.hooks.rotary import find_rotary
from attnlens.lens import Inputs, Lens

CompositionKind = Literal["q", "k", "v"]


@dataclass(frozen=True)
class Composition:
    """Scores of pairs of heads, a sender in an earlier layer than its receiver.

    Attributes:
        kinds: by what the receiver reads the sender, in the order of every `kind` axis.
        senders, receivers: the heads.
        score: 0 to 1; NaN where there is no such pair, or one of the two has weights of 0.
        baseline: mean score of Gaussian matrices of the same shapes; NaN where there is no pair.
        spread: standard deviation of these scores.
        offset: query position less key position, under rotary embedding; else None.
        draws, seed: of the baseline.
        notes: what a reader should know.

    """

    kinds: tuple[CompositionKind, ...]
    senders: tuple[Head, ...]
    receivers: tuple[Head, ...]
    score: Float[Tensor, "kind sender receiver"]
    baseline: Float[Tensor, "kind sender receiver"]
    spread: Float[Tensor, "kind sender receiver"]
    offset: int | None
    draws: int
    seed: int
    notes: tuple[str, ...]

    @property
    def over_baseline(self) -> Float[Tensor, "kind sender receiver"]:
        """The score less that of random weights."""
        return self.score - self.baseline

    def to_frame(self) -> pd.DataFrame:
        """One row a pair and kind, the largest over baseline first; weights of 0 last, as NaN."""
        kind, a, b = (~self.baseline.isnan()).nonzero().T.tolist()
        frame = pd.DataFrame(
            {
                "sender": [str(self.senders[number]) for number in a],
                "receiver": [str(self.receivers[number]) for number in b],
                "kind": [self.kinds[number] for number in kind],
                "score": self.score[kind, a, b].numpy(),
                "baseline": self.baseline[kind, a, b].numpy(),
                "spread": self.spread[kind, a, b].numpy(),
                "over_baseline": self.over_baseline[kind, a, b].numpy(),
            }
        )
        return frame.sort_values("over_baseline", ascending=False, ignore_index=True, kind="stable")


@torch.no_grad()
def composition(
    lens: Lens,
    kind: CompositionKind | None = None,
    senders: HeadSpec | None = None,
    receivers: HeadSpec | None = None,
    offset: int | None = None,
    draws: int = 32,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> Composition:
    """Composition of heads: `|W_OV^a M| / (|W_OV^a| |M|)` in Frobenius norms, less that by chance.

    M is `W_QK^b` for "q" (what the receiver's queries read), its transpose for "k" and `W_OV^b` for
    "v"; all three unless one is asked for. Row vectors: `W_OV = W_V W_O`, `W_QK = W_Q W_K^T`. The
    gains of norms are folded into the weights, and the mean that a LayerNorm takes away; biases are
    left out. Under rotary embedding `W_QK` is that of a query `offset` tokens after its key: "q"
    and "k" need it. Pairs lie in one stack, the sender in an earlier layer; cross-attention reads
    its stack by queries alone. The baseline is the mean over `draws` of Gaussian weights of the
    same shapes. Products are of halves, `d_head d_model` each: one matrix product serves all pairs
    of two layers, and nothing is `d_model d_model`. `inputs` are run once, to find the norms.

    Elhage et al. 2021, A mathematical framework for transformer circuits.

    Raises:
        InputError: an unknown kind, no pair, an offset that is missing or not possible, no draws.
        UnsupportedModelError: weights that are not one matrix a head, or a rotary embedding that
            cannot be told.

    """
    kinds = _known(kind, draws)
    sending, receiving = _paired(lens, senders, receivers)
    given = example_inputs(lens.model) if inputs is None else lens.encode(inputs).inputs
    turns = _turns(lens, receiving, kinds, offset, given)
    weights = {name: lens.weights(name) for name in _sites((*sending, *receiving))}
    norms = find_norms(lens.model, lens.anatomy, weights, given)
    shape = (len(kinds), len(sending), len(receiving))
    score, baseline, spread = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(3))
    chance = _Chance(draws, seed)
    for source, a in _sites(sending).items():
        left = _sent(weights[source], norms[source])[[sending[place].head for place in a]]
        for target, b in _sites(receiving).items():
            if not _follows(sending[a[0]], receiving[b[0]]):
                continue
            for number, own in enumerate(kinds):
                if own != "q" and lens.anatomy[target].kind == "cross":
                    continue
                right = _received(own, weights[target], norms[target], turns.get(target), offset)
                picked = right[[receiving[place].head for place in b]]
                cells = (number, torch.tensor(a)[:, None], torch.tensor(b))
                score[cells] = pair_scores(left, picked).cpu()
                _, d_v, d_model = left.shape
                baseline[cells], spread[cells] = chance.of(d_v, d_model, right.shape[2])
    return Composition(
        kinds=kinds,
        senders=sending,
        receivers=receiving,
        score=score,
        baseline=baseline,
        spread=spread,
        offset=offset if any(map(_turning, turns.values())) else None,
        draws=draws,
        seed=seed,
        notes=tuple(_notes(lens, norms, score, baseline, turns, offset)),
    )


def pair_scores(
    left: Float[Tensor, "sender d d_model"], right: Float[Tensor, "receiver d_model e"]
) -> Float[Tensor, "sender receiver"]:
    """`|left right| / (|left| |right|)` of all pairs; NaN where one of the two is 0."""
    product = left.flatten(0, 1) @ right.permute(1, 0, 2).flatten(1)
    blocks = product.view(len(left), left.shape[1], len(right), right.shape[2])
    sizes = left.flatten(1).norm(dim=1)[:, None] * right.flatten(1).norm(dim=1)
    return blocks.pow(2).sum((1, 3)).sqrt() / sizes.where(sizes > 0, torch.nan)


def _sent(weights: HeadWeights, norms: SiteNorms) -> Float[Tensor, "head d_v d_model"]:
    """The half of `W_OV` that others read: `R W_O` with `W_V = Q R`, of the same norm as it."""
    value, output = _ov(weights, norms)
    return _triangle(value) @ output


def _received(
    kind: CompositionKind,
    weights: HeadWeights,
    norms: SiteNorms,
    rotary: Rotary | None,
    offset: int | None,
) -> Float[Tensor, "head d_model d"]:
    """The half of `W_QK`, its transpose or `W_OV` that reads the stream, of the same norm as it."""
    if kind == "v":
        value, output = _ov(weights, norms)
        return value @ _triangle(output.mT).mT
    query, key = weights.query.double(), weights.key.double()
    query, key = _folded(norms, "query", query), _folded(norms, "key", key)
    if rotary is not None and _turning(rotary) and offset is not None:
        query = rotary.turn(query.flatten(0, 1), offset).view(query.shape)
    key = key.repeat_interleave(len(query) // len(key), 0)
    reads, other = (query, key) if kind == "q" else (key, query)
    return reads @ _triangle(other).mT


def _ov(weights: HeadWeights, norms: SiteNorms) -> tuple[Tensor, Tensor]:
    """W_V, `head d_model d_v`, and W_O, `head d_v d_model`, of each query head, norms folded."""
    value, output = _folded(norms, "value", weights.value.double()), weights.output.double()
    if norms.written is not None:
        output = norms.written.after(output)
    return value.repeat_interleave(len(output) // len(value), 0), output


def _folded(norms: SiteNorms, part: str, weight: Tensor) -> Float[Tensor, "head d_model d"]:
    return norms.reads[part].before(weight) if part in norms.reads else weight


def _triangle(matrix: Float[Tensor, "*batch a d"]) -> Float[Tensor, "*batch d d"]:
    """R of `matrix = Q R`: `|matrix x| = |R x|`, for Q is orthonormal."""
    return torch.linalg.qr(matrix, mode="r").R


class _Chance:
    """Scores of Gaussian weights, by their shapes: mean and standard deviation over draws."""

    def __init__(self, draws: int, seed: int) -> None:
        self._draws = draws
        self._seed = seed
        self._known: dict[tuple[int, int, int], tuple[float, float]] = {}

    def of(self, d_v: int, d_model: int, d: int) -> tuple[float, float]:
        """The sender's values are `d_v` wide; the receiver's queries and keys, or values, `d`."""
        shape = (d_v, d_model, d)
        if shape not in self._known:
            draw = torch.Generator().manual_seed(self._seed)
            found = torch.stack([self._score(draw, *shape) for _ in range(self._draws)])
            self._known[shape] = float(found.mean()), float(found.std())
        return self._known[shape]

    def _score(self, draw: torch.Generator, d_v: int, d_model: int, d: int) -> Tensor:
        value, output, reads, other = (
            torch.randn(d_model, width, generator=draw, dtype=torch.float64)
            for width in (d_v, d_v, d, d)
        )
        left, right = _triangle(value) @ output.mT, reads @ _triangle(other).mT
        return pair_scores(left[None], right[None])[0, 0]


def _known(kind: CompositionKind | None, draws: int) -> tuple[CompositionKind, ...]:
    kinds = get_args(CompositionKind)
    if kind is not None and kind not in kinds:
        raise InputError(f'There is no composition {kind!r}; there is "q", "k" and "v".')
    if draws < 2:
        raise InputError(f"draws={draws}; the baseline and its spread need two at least.")
    return kinds if kind is None else (kind,)


def _paired(
    lens: Lens, senders: HeadSpec | None, receivers: HeadSpec | None
) -> tuple[tuple[Head, ...], tuple[Head, ...]]:
    """The heads that are in a pair, of those asked for."""
    first, second = (
        lens.anatomy.heads if spec is None else lens.anatomy.find(spec)
        for spec in (senders, receivers)
    )
    sending = tuple(a for a in first if any(_follows(a, b) for b in second))
    receiving = tuple(b for b in second if any(_follows(a, b) for a in first))
    if not sending:
        raise InputError(
            "None of the receivers is in a later layer than a sender, in the same stack, so there "
            "is no pair; name others, or leave senders and receivers out for all."
        )
    return sending, receiving


def _follows(sender: Head, receiver: Head) -> bool:
    return sender.stack == receiver.stack and sender.layer < receiver.layer


def _sites(heads: Sequence[Head]) -> dict[str, list[int]]:
    """By site, the places of its heads."""
    found: dict[str, list[int]] = {}
    for place, head in enumerate(heads):
        found.setdefault(head.site, []).append(place)
    return found


def _turning(rotary: Rotary) -> bool:
    return rotary.layout != "none"


def _turns(
    lens: Lens,
    receiving: Sequence[Head],
    kinds: Sequence[CompositionKind],
    offset: int | None,
    inputs: Mapping[str, Tensor],
) -> dict[str, Rotary]:
    """How queries and keys turn at the receivers' sites; nothing where only values are asked."""
    if tuple(kinds) == ("v",):
        return {}
    sites = [lens.anatomy[name] for name in _sites(receiving)]
    found = find_rotary(lens.model, lens.anatomy, sites, inputs)
    unknown = [name for name, rule in found.items() if rule.layout == "unknown"]
    if unknown:
        raise UnsupportedModelError(
            f"The rotary embedding at {', '.join(unknown)} could not be told, so W_QK of an offset "
            'is not known. Composition by values needs none: kind="v".'
        )
    if offset is None and any(map(_turning, found.values())):
        raise InputError(
            "Queries and keys turn with the position (rotary embedding), so q- and k-composition "
            "differ by distance. Say how many tokens the key is before the query, composition(..., "
            'offset=1), or take values, which do not turn: kind="v".'
        )
    if offset is not None and offset < 0 and any(site.causal for site in sites):
        raise InputError(f"offset={offset}: a causal query sees no later key; give 0 or more.")
    return found


def _notes(
    lens: Lens,
    norms: Mapping[str, SiteNorms],
    score: Tensor,
    baseline: Tensor,
    turns: Mapping[str, Rotary],
    offset: int | None,
) -> Iterator[str]:
    if offset is not None and not any(map(_turning, turns.values())):
        yield f"No query or key asked for turns with the position: offset={offset} is idle."
    dead = int((score.isnan() & ~baseline.isnan()).sum())
    if dead:
        yield (
            f"{dead} scores are NaN: one head of each of these pairs has weights of 0 (a head that "
            "asks by a bias alone has no W_QK)."
        )
    bare = [name for name, own in norms.items() if not own.reads]
    if bare:
        yield f"No norm was found before {', '.join(bare)}: these weights are as they are."
    inside = [name for name, own in norms.items() if own.within]
    if inside:
        yield (
            f"Attention has norms inside at {', '.join(inside)} (of queries and keys, say), which "
            "are left out."
        )
    if any(_outside(lens, name, own) for name, own in norms.items()):
        yield (
            "Blocks norm the stream itself, so that several norms lie between two heads: that "
            "before the reader is folded, those between are left out."
        )
    if len(lens.anatomy.stacks) > 1:
        yield "Pairs of heads in two stacks are left out."


def _outside(lens: Lens, site: str, norms: SiteNorms) -> bool:
    """Whether the norm that a site reads stands before its block, and so norms the stream."""
    block, norm = lens.anatomy[site].block, norms.reads.get("query")
    return block is not None and norm is not None and not norm.module.startswith(f"{block}.")
