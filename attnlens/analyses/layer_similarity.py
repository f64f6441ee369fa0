"""How alike the maps of layers are: which layers could share their attention.

Rajabzadeh et al. 2024, EchoAtt: attend, copy, then adjust for more efficient large language models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.across_layers import (
    PromptRows,
    check_rows,
    comparable_sites,
    prompt_rows,
)
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.anatomy import HeadSpec, Site
from attnlens.errors import InputError
from attnlens.lens import Inputs, Lens

BLOCK_BYTES = 8 << 20
"""Weights of all layers' heads held at a time."""
DEVICE_BYTES = 256 << 20
"""The same where the model is not on the CPU."""


@dataclass(frozen=True)
class LayerSimilarity:
    """Cosines of the maps of all pairs of layers; each is `site site`, a mean over prompts.

    Attributes:
        sites: names of the sites, in the order of every `site` axis.
        matched: head h beside head h, then the mean over heads; NaN where two sites have different
            numbers of heads.
        head_mean: the means over heads of both maps beside each other.
        unmatched: the baseline of `matched`: mean cosine of head h with every other head. What
            all maps have in common (the first row, a sink, the diagonal) is in it too. NaN where
            two sites have one head each.
        prompts: number of prompts.
        rows: rows that counted, over all prompts.
        rows_a_prompt, seed: the settings; `rows_a_prompt` None means all rows.
        notes: what a reader should know.

    """

    sites: tuple[str, ...]
    matched: Interval
    head_mean: Interval
    unmatched: Interval
    prompts: int
    rows: int
    rows_a_prompt: int | None
    seed: int
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a pair of sites: how many sites apart, each cosine and its bounds."""
        count = len(self.sites)
        kept = [(a, b) for a in range(count) for b in range(a + 1, count)]
        frame = pd.DataFrame(
            {
                "site": [self.sites[a] for a, _ in kept],
                "other": [self.sites[b] for _, b in kept],
                "apart": [b - a for a, b in kept],
            }
        )
        for name in ("matched", "head_mean", "unmatched"):
            for end, values in zip(("", "_low", "_high"), getattr(self, name), strict=True):
                frame[name + end] = [float(values[pair]) for pair in kept]
        return frame

    def neighbours(self) -> pd.DataFrame:
        """The rows of `to_frame()` that are neighbouring sites, in the model's order."""
        frame = self.to_frame()
        return frame.loc[frame["apart"] == 1].reset_index(drop=True)


def layer_similarity(
    lens: Lens,
    texts: Inputs,
    rows: int | None = None,
    layers: HeadSpec | int | None = None,
    batch_size: int | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LayerSimilarity:
    """Cosine of the maps of every two layers: `sum A B / sqrt(sum A^2 sum B^2)` over rows and keys.

    Head by head (`matched`) and of the maps averaged over heads (`head_mean`), since papers mean
    one or the other (Rajabzadeh et al. 2024). Each prompt has its own cosines, which are averaged.
    `rows` of each prompt are drawn at random, None takes all.

    Raises:
        InputError: layers of several stacks, fewer than two layers, or rows out of range.

    """
    check_bootstrap(resamples, confidence)
    sites = comparable_sites(lens, layers)
    if len(sites) < 2:
        raise InputError("Layers are compared with each other: name two at least.")
    check_rows(rows)
    counted = 0
    found: dict[int, Float[Tensor, "kind site site"]] = {}
    for prompt in prompt_rows(lens, texts, sites, batch_size):
        chosen = prompt.sample(rows, seed)
        found[prompt.number] = torch.stack(cosines(products(prompt, chosen), sites))
        counted += len(chosen)
    values = torch.stack([found[number] for number in sorted(found)])
    intervals = [bootstrap_mean(values[:, n], resamples, confidence, seed) for n in range(3)]
    return LayerSimilarity(
        tuple(site.name for site in sites),
        *intervals,
        prompts=len(found),
        rows=counted,
        rows_a_prompt=rows,
        seed=seed,
        notes=_notes(len(found), sites),
    )


def products(prompt: PromptRows, rows: Sequence[int]) -> Float[Tensor, "head head"]:
    """`sum_ts A_i[t, s] A_j[t, s]` of all pairs of heads over the given rows, in float64."""
    budget = BLOCK_BYTES if prompt.rules[0].query.device.type == "cpu" else DEVICE_BYTES
    heads = sum(rule.shape[1] for rule in prompt.rules)
    total = torch.zeros(heads, heads, dtype=torch.float64)
    for block in prompt.blocks(rows, budget):
        flat = block.flatten(1)
        total += (flat @ flat.T).cpu()
    return total


def cosines(
    product: Float[Tensor, "head head"], sites: Sequence[Site]
) -> tuple[Float[Tensor, "site site"], Float[Tensor, "site site"], Float[Tensor, "site site"]]:
    """Matched, head-mean and unmatched cosines of all pairs of sites, from the heads' products."""
    heads = torch.tensor([site.heads for site in sites])
    place = torch.arange(len(sites)).repeat_interleave(heads)
    member = torch.nn.functional.one_hot(place, len(sites)).double()
    number = torch.cat([torch.arange(site.heads) for site in sites])
    same = (number[:, None] == number).double()

    norms = product.diagonal().sqrt()
    cosine = product / (norms[:, None] * norms)
    matched = member.T @ (cosine * same) @ member
    unmatched = member.T @ cosine @ member - matched
    pairs = heads.minimum(heads[:, None]).double()
    unequal = heads != heads[:, None]
    # The cosine of means is that of sums: a mean's 1 / heads falls out.
    sums = member.T @ product @ member
    scale = sums.diagonal().sqrt()
    return (
        (matched / pairs).masked_fill(unequal, torch.nan),
        sums / (scale[:, None] * scale),
        unmatched / (heads * heads[:, None] - pairs),
    )


def _notes(prompts: int, sites: Sequence[Site]) -> tuple[str, ...]:
    notes: list[str] = []
    if prompts < 2:
        notes.append("One text gives no interval over texts; give several.")
    if len({site.heads for site in sites}) > 1:
        notes.append("Sites with different numbers of heads have no cosine head by head (NaN).")
    windows = {site.window for site in sites}
    if len(windows) > 1:
        notes.append("Some layers see a window and some see all: their maps differ for that alone.")
    return tuple(notes)
