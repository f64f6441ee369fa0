"""Effective ranks of a head: of W_Q W_K^T, of W_V W_O, and of its map.

Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.across_layers import prompt_rows
from attnlens.analyses.per_head import HeadTable
from attnlens.analyses.uncertainty import bootstrap_mean, check_bootstrap
from attnlens.anatomy import HeadSpec, Site
from attnlens.anatomy.weights import HeadWeights
from attnlens.errors import BudgetError, UnsupportedModelError
from attnlens.hooks.rows import Rows
from attnlens.lens import Inputs, Lens
from attnlens.lens.asked import parse_bytes

COPIES = 3
"""Float64 maps of one head that its singular values take: the map, a copy, room to work."""


@dataclass(frozen=True)
class HeadRanks(HeadTable):
    """Per head: `qk_rank`, `ov_rank`, and `pattern_rank` where texts were given.

    A rank lies between 1 and the number of singular values; 0 is a matrix of zeros. The ranks of
    weights are not sampled, so their bounds are NaN; those of maps are over texts.

    Attributes:
        random: the baseline of `qk_rank` and `ov_rank`, `head 2`: the same product of matrices of
            the same shapes with Gaussian entries.
        d_qk, d_v: widths of each head, the largest ranks that its weights can have.
        prompts: number of texts; 0 where none were given.
        lengths: rows of each text. A map's rank cannot be larger and grows with it.
        seed: of the random matrices and the bootstrap.
        notes: what a reader should know.

    """

    random: Float[Tensor, "head 2"]
    d_qk: tuple[int, ...]
    d_v: tuple[int, ...]
    prompts: int
    lengths: tuple[int, ...]
    seed: int
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a head: each rank with its bounds, the random baselines and the widths."""
        frame = super().to_frame()
        frame["qk_random"], frame["ov_random"] = self.random.T.tolist()
        frame["d_qk"], frame["d_v"] = self.d_qk, self.d_v
        return frame


def head_ranks(
    lens: Lens,
    texts: Inputs | None = None,
    layers: HeadSpec | int | None = None,
    batch_size: int | None = None,
    budget: str | int = "1GB",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> HeadRanks:
    """Effective rank `exp(-sum_i p_i ln p_i)`, `p_i` the singular values over their sum.

    Of `W_Q W_K^T` and `W_V W_O` from the weights as they are, norms and biases left out (under
    rotary embedding `W_Q W_K^T` is the score of a token with its own position), and with `texts` of
    each head's map, which is made dense for one head and text at a time: memory grows with tokens^2
    and time with tokens^3. NaN where a model has no such weights a head (see `notes`).

    Raises:
        BudgetError: a map whose singular values take more than `budget` bytes.

    """
    check_bootstrap(resamples, confidence)
    sites = lens.anatomy.layers(layers)
    heads = tuple(site.head(number) for site in sites for number in range(site.heads))
    weights = {site.name: lens.weights(site.name) for site in sites}
    notes: list[str] = []
    values = {
        "qk_rank": _of_weights(weights, _qk, "W_Q W_K^T", notes)[None],
        "ov_rank": _of_weights(weights, _ov, "W_V W_O", notes)[None],
    }
    lengths: tuple[int, ...] = ()
    if texts is not None:
        _check_budget(lens, texts, sites, parse_bytes(budget))
        values["pattern_rank"], lengths = _of_maps(lens, texts, sites, batch_size)
        notes += _notes(lengths)
    each = [bootstrap_mean(own, resamples, confidence, seed) for own in values.values()]
    return HeadRanks(
        heads,
        tuple(values),
        *(torch.stack(part, -1) for part in zip(*each, strict=True)),
        random=torch.cat([_random(weights[site.name], seed) for site in sites]),
        d_qk=tuple(site.d_qk for site in sites for _ in range(site.heads)),
        d_v=tuple(site.d_v for site in sites for _ in range(site.heads)),
        prompts=len(lengths),
        lengths=lengths,
        seed=seed,
        notes=tuple(notes),
    )


def effective_rank(singular: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
    """`exp(-sum_i p_i ln p_i)`, `p` the singular values over their sum; 0 where all are 0."""
    total = singular.sum(-1, keepdim=True)
    shares = singular / total.where(total > 0, 1)
    return torch.special.entr(shares).sum(-1).exp() * (total[..., 0] > 0)


def product_singular_values(
    left: Float[Tensor, "*batch a d"], right: Float[Tensor, "*batch b d"]
) -> Float[Tensor, "*batch value"]:
    """Singular values of `left right^T` by a d x d matrix, in float64: those of `R_left R_right^T`.

    The a x b product is never made: `left = Q R` with orthonormal Q leaves them as they are.
    """
    small = torch.linalg.qr(left.double(), mode="r").R
    other = torch.linalg.qr(right.double(), mode="r").R
    return singular_values(small @ other.mT)


def singular_values(matrix: Float[Tensor, "*batch a b"]) -> Float[Tensor, "*batch value"]:
    """Singular values; NaN for a matrix that holds NaN or infinity, at which torch raises."""
    finite = matrix.isfinite().all(-1).all(-1)[..., None]
    values = torch.linalg.svdvals(matrix.where(finite[..., None], 0))
    return values.where(finite, torch.nan)


def _qk(weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """W_Q and W_K of each query head, `head d_model d_qk`."""
    query, key = weights.query, weights.key
    return query, key.repeat_interleave(len(query) // len(key), 0)


def _ov(weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """W_V and the transpose of W_O of each query head, `head d_model d_v`."""
    value, output = weights.value, weights.output
    return value.repeat_interleave(len(output) // len(value), 0), output.mT


Parts = Callable[[HeadWeights], tuple[Tensor, Tensor]]


@torch.no_grad()
def _of_weights(
    weights: dict[str, HeadWeights], parts: Parts, name: str, notes: list[str]
) -> Float[Tensor, " head"]:
    """Effective ranks of a product of two weights, NaN and a note where it is not defined."""
    found: list[Tensor] = []
    missing: dict[str, UnsupportedModelError] = {}
    for site, own in weights.items():
        try:
            found.append(effective_rank(product_singular_values(*parts(own))).cpu())
        except UnsupportedModelError as error:
            found.append(torch.full((own.site.heads,), torch.nan, dtype=torch.float64))
            missing[site] = error
    if missing:
        first = next(iter(missing.values()))
        notes.append(f"{name} has no rank at {', '.join(missing)}. {first}")
    return torch.cat(found)


@torch.no_grad()
def _random(weights: HeadWeights, seed: int) -> Float[Tensor, "head 2"]:
    """Ranks of Gaussian matrices of the same shapes, one draw a site; NaN as for the weights."""
    generator = torch.Generator().manual_seed(seed)
    ranks: list[Tensor] = []
    for parts in (_qk, _ov):
        try:
            shapes = [part.shape[1:] for part in parts(weights)]
        except UnsupportedModelError:
            ranks.append(torch.tensor(torch.nan, dtype=torch.float64))
            continue
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        ranks.append(effective_rank(product_singular_values(*drawn)))
    return torch.stack(ranks).expand(weights.site.heads, 2)


def _of_maps(
    lens: Lens, texts: Inputs, sites: Sequence[Site], batch_size: int | None
) -> tuple[Float[Tensor, "prompt head"], tuple[int, ...]]:
    """Effective rank of each head's map of each text, and the rows of each text."""
    found: dict[str, dict[int, Tensor]] = {site.name: {} for site in sites}
    rows: dict[int, int] = {}
    for stack in dict.fromkeys(site.stack for site in sites):
        own = [site for site in sites if site.stack == stack]
        for prompt in prompt_rows(lens, texts, own, batch_size):
            rows[prompt.number] = max(rows.get(prompt.number, 0), len(prompt.queries))
            for site, rule in zip(own, prompt.rules, strict=True):
                found[site.name][prompt.number] = _map_ranks(rule, prompt.queries)
    order = sorted(rows)
    ranks = [torch.stack([found[site.name][number] for number in order]) for site in sites]
    return torch.cat(ranks, 1), tuple(rows[number] for number in order)


@torch.no_grad()
def _map_ranks(rule: Rows, queries: Sequence[int]) -> Float[Tensor, " head"]:
    """Effective rank of each head's map over the real rows, one dense map at a time."""
    ranks: list[Tensor] = []
    for head in range(rule.shape[1]):
        own = rule.part(slice(head, head + 1)).dense(queries)[0, 0].double()
        seen = own[:, (own != 0).any(0)]  # columns of zeros, padding among them, change nothing
        ranks.append(effective_rank(singular_values(seen)).cpu())
    return torch.stack(ranks)


def _check_budget(lens: Lens, texts: Inputs, sites: Sequence[Site], budget: int) -> None:
    extents = lens.encode(texts).extents(lens.anatomy)
    known = [extents[site.name] for site in sites if site.name in extents]
    largest = max((extent.queries * extent.keys for extent in known), default=0)
    if largest * 8 * COPIES > budget:
        fits = int((budget / (8 * COPIES)) ** 0.5)
        raise BudgetError(
            f"The singular values of a map of {largest:,} weights take {COPIES} copies of it in "
            f"float64, {largest * 8 * COPIES:,} bytes, over the budget of {budget:,}. Cut the "
            f"texts to {fits} tokens, or give a larger budget: budget='8GB'. Without texts only "
            "the ranks of the weights are taken, which need no map."
        )


def _notes(lengths: Sequence[int]) -> list[str]:
    notes: list[str] = []
    if len(lengths) < 2:
        notes.append("One text gives no interval over texts; give several.")
    if len(set(lengths)) > 1:
        notes.append(
            f"Texts have {min(lengths)} to {max(lengths)} rows, and the rank of a map grows with "
            "them: its interval holds both texts and lengths."
        )
    return notes
