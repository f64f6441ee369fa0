"""Massive query and key values: channels of q and k far larger than the others of their head.

Jin et al. 2025, Massive values in self-attention modules are the key to contextual knowledge
understanding. Su et al. 2021, RoFormer (rotary position embedding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.analyses.per_head import HeadTable, table_of
from attnlens.analyses.uncertainty import check_bootstrap
from attnlens.anatomy import HeadSpec, Site
from attnlens.anatomy.rotary import Rotary, tables
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.rotary import ROWS, find_rotary
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer
from attnlens.hooks.tokens import Sides
from attnlens.lens import Batch, Inputs, Lens
from attnlens.lens.inputs import split

Side = Literal["query", "key"]
SIDES: tuple[Side, Side] = ("query", "key")


@dataclass(frozen=True)
class ChannelNorms:
    """Channels of the queries (or keys) of one site; `head` is a group where they are keys.

    Attributes:
        norm: L2 norm of the channel over a prompt's real positions, mean over prompts.
        ratio: the norm over that of the head's median channel, mean over prompts; NaN where most
            channels of the head are 0.
        massive: share of the prompts in which the ratio reaches the threshold.

    """

    norm: Float[Tensor, "head channel"]
    ratio: Float[Tensor, "head channel"]
    massive: Float[Tensor, "head channel"]


@dataclass(frozen=True)
class MassiveQK(HeadTable):
    """Per head the largest ratio of a channel to the median channel, and how many are massive.

    `query_peak` and `key_peak` are the largest ratios, `query_massive` and `key_massive` numbers of
    channels over the threshold; those of the keys are of the group that the head reads.
    """

    query: Mapping[str, ChannelNorms]
    """The query channels of each site."""
    key: Mapping[str, ChannelNorms]
    """The key channels of each site, a row a group."""
    rotary: Mapping[str, Rotary]
    """How the channels of each site turn with the position."""
    threshold: float
    """Ratio to the median channel from which a channel is massive."""
    prompts: int
    notes: tuple[str, ...]

    def of(self, side: Side) -> Mapping[str, ChannelNorms]:
        """The channels of one side, by site."""
        if side not in SIDES:
            raise InputError(f"There is no side {side!r}; choose 'query' or 'key'.")
        return self.query if side == "query" else self.key

    def channels(self) -> pd.DataFrame:
        """One row a channel whose mean ratio reaches the threshold, the largest first.

        `head` is `L0H1` for a query and `L0G1` for the keys of a group; `frequency` in radians a
        token and `wavelength` in tokens are those of its rotary pair (0 and infinite where it does
        not turn, NaN where that is unknown), `partner` the other channel of the pair.
        """
        rows: list[dict[str, Any]] = []
        for side in SIDES:
            for site, norms in self.of(side).items():
                rotary = self.rotary[site]
                for head, channel in (norms.ratio >= self.threshold).nonzero().tolist():
                    place = head, channel
                    rows.append(
                        {
                            "head": f"{site}{'H' if side == 'query' else 'G'}{head}",
                            "site": site,
                            "side": side,
                            "index": head,
                            "channel": channel,
                            "norm": float(norms.norm[place]),
                            "ratio": float(norms.ratio[place]),
                            "prompts": float(norms.massive[place]),
                            "frequency": float(rotary.frequencies[channel]),
                            "wavelength": float(rotary.wavelengths[channel]),
                            "partner": int(rotary.partner[channel]),
                        }
                    )
        frame = pd.DataFrame(rows, columns=_COLUMNS)
        return frame.sort_values("ratio", ascending=False, kind="stable", ignore_index=True)


_COLUMNS = ["head", "site", "side", "index", "channel", "norm", "ratio", "prompts", "frequency",
            "wavelength", "partner"]  # fmt: skip


def massive_qk(
    lens: Lens,
    texts: Inputs,
    threshold: float = 5.0,
    layers: HeadSpec | int | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> MassiveQK:
    """Norm of each channel of q and k, `|q_c| = sqrt(sum_t q[t, c]^2)`, over the median channel's.

    q and k are those that attention receives, after norms and rotary embedding; t runs over real
    positions. A channel is massive from `threshold` times the median norm of its head (of an even
    number of channels the lower middle one). Jin et al. take 5 times the mean. Each channel's
    rotary frequency is that of the model's own table, recognised by shifting the positions. Memory
    grows with neither the tokens nor the channels of the prompts.

    Raises:
        InputError: a threshold that is not above 1.

    """
    if not 1 < threshold < math.inf:
        raise InputError(
            f"threshold={threshold} cannot be used: it is a multiple of the median channel, so it "
            "lies above 1."
        )
    check_bootstrap(resamples, confidence)
    whole = lens.encode(texts)
    anatomy = lens.anatomy_for(whole)
    sites = anatomy.layers(layers)
    rotary = find_rotary(lens.model, anatomy, sites, _short(whole))
    tally = _Tally(sites, threshold)
    parts, order = split(whole, batch_size)
    for part in parts:
        tally.sides, tally.size = part.sides, part.size
        lens.observe(part, tally)
    sites = tally.counted()
    back = torch.tensor(order).argsort()
    values = {
        f"{side}_{name}": torch.cat(
            [torch.cat(tally.heads[site.name, side][name]) for site in sites], 1
        )[back]
        for side in SIDES
        for name in ("peak", "massive")
    }
    names, interval = table_of(values, resamples, confidence, seed)
    return MassiveQK(
        tuple(site.head(head) for site in sites for head in range(site.heads)),
        names,
        *interval,
        query={site.name: tally.means(site, "query", whole.size) for site in sites},
        key={site.name: tally.means(site, "key", whole.size) for site in sites},
        rotary={site.name: rotary[site.name] for site in sites},
        threshold=threshold,
        prompts=whole.size,
        notes=_notes(lens.model, rotary, tally, whole.size),
    )


def channel_norms(
    x: Float[Tensor, "batch head position channel"], real: Bool[Tensor, "batch position"] | None
) -> Float[Tensor, "batch head channel"]:
    """`sqrt(sum_t x[t, c]^2)` over the real positions, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if real is not None:
        x = x.masked_fill(~real[:, None, :, None], 0)
    return torch.linalg.vector_norm(x, dim=2, dtype=dtype).double()


def ratios(norms: Float[Tensor, "*head channel"]) -> Float[Tensor, "*head channel"]:
    """Norms over that of the head's median channel; NaN where the median is 0."""
    median = norms.median(-1, keepdim=True).values
    return (norms / median).masked_fill(median == 0, math.nan)


class _Tally(Observer):
    """Observer that sums the norms of channels over prompts, and keeps two numbers a head."""

    def __init__(self, sites: Sequence[Site], threshold: float) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.sides: Sides | None = None
        self.size = 0
        self.heads: dict[tuple[str, Side], dict[str, list[Tensor]]] = {}
        self.left_out: set[str] = set()
        self._sites = tuple(sites)
        self._threshold = threshold
        self._sums: dict[tuple[str, Side], list[Tensor]] = {}

    @torch.no_grad()
    def see(self, site: Site, call: Call) -> Call:
        """Reduce q and k of one call."""
        if call.query.shape[0] != self.size or call.key.shape[0] != self.size:
            self.left_out.add(site.name)
            return call
        assert self.sides is not None
        queries = self.sides.queries(site).cut(call.query.shape[2]).real
        keys = self.sides.keys(site).cut(call.key.shape[2]).real
        self._add(site, "query", channel_norms(call.query, queries))
        self._add(site, "key", channel_norms(call.key, keys))
        return call

    def _add(self, site: Site, side: Side, norms: Float[Tensor, "batch head channel"]) -> None:
        norms = norms.cpu()
        ratio = ratios(norms)
        massive = ratio >= self._threshold
        own = self.heads.setdefault((site.name, side), {"peak": [], "massive": []})
        times = site.heads // norms.shape[1]  # the query heads that read one group
        own["peak"].append(ratio.amax(-1).repeat_interleave(times, 1))
        count = massive.sum(-1).double().masked_fill(ratio.isnan().any(-1), math.nan)
        own["massive"].append(count.repeat_interleave(times, 1))
        sums = [part.double().sum(0) for part in (norms, ratio, massive)]
        before = self._sums.get((site.name, side))
        self._sums[site.name, side] = (
            sums if before is None else [a + b for a, b in zip(before, sums, strict=True)]
        )

    def counted(self) -> tuple[Site, ...]:
        """The sites that have rows of their own for each prompt."""
        found = tuple(site for site in self._sites if site.name not in self.left_out)
        if not found:
            raise UnsupportedModelError(
                f"The first axis of q at {', '.join(sorted(self.left_out))} is not the prompt, so "
                "its channels cannot be averaged over prompts. Name other layers, if there are any."
            )
        return found

    def means(self, site: Site, side: Side, prompts: int) -> ChannelNorms:
        """Means over prompts."""
        norm, ratio, massive = (total / prompts for total in self._sums[site.name, side])
        return ChannelNorms(norm, ratio, massive)


def _short(batch: Batch) -> dict[str, Any]:
    """A few tokens of the first prompt; the whole input where it holds more than tokens."""
    if any(isinstance(v, Tensor) and v.is_floating_point() for v in batch.inputs.values()):
        return dict(batch.inputs)
    short: dict[str, Any] = {}
    for ids, mask in (
        ("input_ids", "attention_mask"),
        ("decoder_input_ids", "decoder_attention_mask"),
    ):
        if ids in batch.inputs:
            row, real = batch.inputs[ids][:1], batch.inputs.get(mask)
            short[ids] = (row if real is None else row[:, real[0].bool()])[:, :ROWS]
    return short


def _notes(
    model: nn.Module, rotary: Mapping[str, Rotary], tally: _Tally, prompts: int
) -> tuple[str, ...]:
    notes: list[str] = []
    if prompts < 2:
        notes.append("One prompt gives no interval over prompts; give several.")
    if not tables(model):
        notes.append("The model holds no table of rotary frequencies (inv_freq): no channel turns.")
    untold = [name for name, own in rotary.items() if own.layout == "unknown"]
    if untold:
        notes.append(
            f"What frequencies the channels of {', '.join(untold)} turn at cannot be told: no "
            "table of the model explains what shifting the positions does to them."
        )
    if _scales_with_length(model):
        notes.append(
            "The model changes its rotary frequencies with the length of the text; those given "
            "are of short texts."
        )
    if tally.left_out:
        names = ", ".join(sorted(tally.left_out))
        notes.append(f"Left out, because the first axis of their q is not the prompt: {names}.")
    return tuple(notes)


def _scales_with_length(model: nn.Module) -> bool:
    kinds: set[str] = set()
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        kinds.update(kind.values() if isinstance(kind, Mapping) else [str(kind)])
    return bool(kinds & {"dynamic", "longrope"})
