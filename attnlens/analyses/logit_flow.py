"""Logit flow, or direct logit attribution: what every part of a model adds to a logit by itself.

The last residual stream is a sum of what embeddings, heads, MLPs and biases wrote to it, and with
the norm's statistics as they were in the run a logit is linear in that stream. So the logit is a
sum over parts, of which a head's is

    DLA_h = (z_h W_O^h * gamma / sigma) . (W_U[:, a] - W_U[:, b])

What a part does to later parts is not in its share. A head's share is again a sum, over the tokens
it attends to: `A[t, s] v_s W_O` along the same direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attention_gradient import columns_over_tokens
from attnlens.analyses.attribution import Attribution, Ledger
from attnlens.analyses.target import Explained, TargetSpec, settle
from attnlens.anatomy import Anatomy, Head, Site
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.direct import Direct, Written
from attnlens.hooks.input_gradients import gradients, graph_run
from attnlens.hooks.mlp import find_mlps
from attnlens.hooks.rows import Rows
from attnlens.lens import Batch, Inputs, Lens

Kind = Literal["embeddings", "head", "mlp", "bias"]

_CLOSES = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest remainder of a sum of parts, as a share of the largest part; 5e-2 in narrower types."""


@dataclass(frozen=True)
class Part:
    """One thing that writes to the residual stream, or adds to the logits."""

    name: str
    """`embeddings`, `L3H5`, `L3.mlp`, or a bias by its name in the model."""
    kind: Kind
    layer: str | None = None
    """The layer that it is part of, `L3`; None for embeddings and for what follows the layers. Of
    embeddings the layer that they enter, where others come before it."""
    head: Head | None = None


@dataclass(frozen=True)
class LogitFlow(Attribution):
    """An attribution that is a sum over parts; `scores` are what heads carry from each token.

    A token's score is `sum over heads of A[t, s] v_s W_O` along the logit, for the token s and the
    row t that is read; the read token's has the embeddings' share, too. `layers` are these sums by
    layer, the embeddings' in the first.
    """

    parts: tuple[Part, ...] = ()
    """In the order in which they ran."""
    shares: Float[Tensor, "batch part"] = field(default_factory=lambda: torch.zeros(0, 0))
    """What each part adds to the value, in float64; they sum to it."""

    def parts_frame(self, prompt: int = 0) -> pd.DataFrame:
        """One row a part in the order of the run: part, kind, layer, share, accumulated."""
        shares = self.shares[prompt]
        return pd.DataFrame(
            {
                "part": [part.name for part in self.parts],
                "kind": [part.kind for part in self.parts],
                "layer": [part.layer for part in self.parts],
                "share": shares.tolist(),
                "accumulated": shares.cumsum(0).tolist(),
            }
        )


@torch.inference_mode(False)
def logit_flow(lens: Lens, inputs: Inputs, target: TargetSpec = None) -> LogitFlow:
    """Split a logit, or the difference of two, over the parts that wrote it.

    `DLA_part = written * gamma / sigma . (W_U[:, a] - W_U[:, b])`, less its mean first under a
    LayerNorm, sigma as it was in the run; biases and the norm's own are parts as well, and all
    parts sum to the value. It takes one forward and one backward. Where the model caps its logits
    or adds to them after the unembedding, the unembedding's output is explained. Elhage et al.
    2021, A mathematical framework for transformer circuits.

    Raises:
        InputError: a target without a finite gradient.
        UnsupportedModelError: the parts do not sum to the value: something else than embeddings,
            attention and MLPs writes to the stream, or the way to the logits is not linear.

    """
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    explained = settle(lens, batch, target)
    direct = Direct(anatomy, _mlp_names(lens, batch, anatomy))
    observers = (direct, *explained.observers(lens, batch))
    with graph_run(lens.model, anatomy, observers, batch.inputs) as output:
        value, before = _explained(explained, output, direct)
        leaves = [written.tensor for written in direct.written]
        found = gradients(value, leaves, "what its parts write")
    reached = [
        (written, gradient)
        for written, gradient in zip(direct.written, found, strict=True)
        if gradient is not None
    ]
    columns = _columns(anatomy, batch.size, reached)
    parts, shares = _shares(anatomy, batch.size, reached)
    value = value.detach()
    _check_sum(lens, anatomy, value, shares, direct.rounded)
    words, by_layer, notes = columns_over_tokens(lens, batch, columns)
    by_layer, scores = by_layer.cpu(), by_layer.sum(1).cpu()
    value, shares = value.double().cpu(), shares.cpu()
    kinds = [part.kind for part in parts]
    heads = [column for column, kind in enumerate(kinds) if kind == "head"]
    entries = {"tokens": scores.double().sum(-1)} | {
        name: shares[:, [kind == own for own in kinds]].sum(-1)
        for name, kind in (("mlps", "mlp"), ("biases", "bias"))
    }
    return LogitFlow(
        method="logit_flow",
        tokens=words,
        scores=scores,
        target=explained.names,
        value=value,
        settings={"explained": before or "the target"},
        layers=by_layer,
        layer_names=tuple(columns),
        heads=shares[:, heads],
        head_names=tuple(head for part in parts if (head := part.head) is not None),
        ledger=Ledger(value, entries),
        notes=(*notes, *_notes(parts, before), *_carried(parts, shares, scores)),
        parts=parts,
        shares=shares,
    )


def _mlp_names(lens: Lens, batch: Batch, anatomy: Anatomy) -> Mapping[str, str]:
    """The module that ends each block's MLP, of the blocks that run on this input."""
    if anatomy is lens.anatomy:
        return lens.mlp_names()
    mlps = find_mlps(lens.model, anatomy, batch.inputs)
    return {block: mlp.name for block, mlp in mlps.items()}


def _explained(
    explained: Explained, output: Any, direct: Direct
) -> tuple[Float[Tensor, " batch"], str | None]:
    """The value that is split, and what it is where the model changes its logits afterwards."""
    if direct.raw is None or explained.tokens is None:
        return explained.metric(output), None
    final, raw = (tensor.detach()[:, -1].double() for tensor in (output.logits, direct.raw))
    factor = (final * raw).sum() / raw.square().sum().clamp_min(1e-30)
    misfit = (final - factor * raw).abs().max() / final.abs().max().clamp_min(1e-30)
    if float(misfit) < _closes(output.logits.dtype):
        return explained.metric(output), None
    before = SimpleNamespace(logits=direct.raw)
    return explained.metric(before), "the logit as the unembedding gives it"


def _notes(parts: Sequence[Part], before: str | None) -> tuple[str, ...]:
    notes: list[str] = []
    if before is not None:
        notes.append(
            "The model caps its logits or adds to them after the unembedding; explained is what "
            "the unembedding gives, so the value is not the model's last logit."
        )
    if parts[0].layer is not None:
        notes.append(
            f"Layers before {parts[0].layer} have no attention; what they write is counted with "
            "the embeddings."
        )
    return tuple(notes)


def _carried(
    parts: Sequence[Part],
    shares: Float[Tensor, "batch part"],
    scores: Float[Tensor, "batch position"],
) -> tuple[str, ...]:
    """What to say where heads write more or less than they carry from tokens."""
    own = torch.tensor([part.kind in ("head", "embeddings") for part in parts])
    gap = (shares[:, own].sum(-1) - scores.double().sum(-1)).abs()
    if not bool((gap > _closes(torch.bfloat16) * shares.abs().amax(-1)).any()):
        return ()
    note = (
        "What heads write is not what their rows carry from tokens (an edit of z, after the "
        "weights were applied): the ledger's remainder is the difference."
    )
    return (note,)


Reached = Sequence[tuple[Written, Tensor]]
"""What parts wrote, with the value's gradient there."""


def _shares(
    anatomy: Anatomy, batch: int, reached: Reached
) -> tuple[tuple[Part, ...], Float[Tensor, "batch part"]]:
    """`part . gradient` of each part, in float64."""
    blocks = {site.block: site.name for site in reversed(anatomy.sites) if site.block}
    parts: list[Part] = []
    columns: list[Tensor] = []
    for written, gradient in reached:
        own = written.tensor.detach() if written.part is None else written.part
        products = own.double() * gradient.double()
        if written.call is not None:
            site = anatomy[written.name]
            parts += [
                Part(str(head), "head", site.name, head)
                for head in (site.head(number) for number in range(site.heads))
            ]
            columns.append(products.sum((1, 3)))
            continue
        parts.append(_part(written, blocks))
        columns.append(products.reshape(batch, -1).sum(1, keepdim=True))
    return tuple(parts), torch.cat(columns, dim=1)


def _part(written: Written, blocks: Mapping[str, str]) -> Part:
    if written.kind == "embeddings":
        entered = next(block for block, name in blocks.items() if name == written.name)
        first = entered.rpartition(".")[2] == "0"
        return Part("embeddings", "embeddings", None if first else written.name)
    if written.kind == "mlp":
        return Part(f"{written.name}.mlp", "mlp", written.name)
    inside = (name for block, name in blocks.items() if written.name.startswith(f"{block}."))
    return Part(written.name, "bias", next(inside, None))


def _check_sum(
    lens: Lens,
    anatomy: Anatomy,
    value: Float[Tensor, " batch"],
    shares: Float[Tensor, "batch part"],
    rounded: bool,
) -> None:
    """Raise where the parts do not sum to the value, and say which blocks may be the reason."""
    dtype = torch.float32 if rounded and value.dtype == torch.float64 else value.dtype
    largest = torch.cat([shares, value.double()[:, None]], 1).abs().amax(1).clamp_min(1e-30)
    error = float(((value.double() - shares.sum(1)) / largest).abs().max())
    if error <= _closes(dtype):
        return
    blocks = dict.fromkeys(site.block for site in anatomy.sites if site.block)
    without = [block for block in blocks if block not in lens.mlps]
    why = f" No MLP was found in {', '.join(without)}." if without else ""
    raise UnsupportedModelError(
        f"What embeddings, heads, MLPs and biases of {anatomy.model} add directly does not sum to "
        f"the target: {error:.1e} of the largest part is missing. Something else writes to the "
        "residual stream (layers without attention, an edit of the stream), or the way from there "
        f"to the target is not linear (a transform before the unembedding).{why} Gradients "
        "take such models: al.attribute(lens, inputs, method='integrated_gradients')."
    )


def _closes(dtype: torch.dtype) -> float:
    return _CLOSES.get(dtype, 5e-2)


def _columns(
    anatomy: Anatomy, batch: int, reached: Reached
) -> dict[str, Float[Tensor, "batch key"]]:
    """What each layer's heads carry from each token; the embeddings' share is the first layer's."""
    columns: dict[str, Tensor] = {}
    for written, gradient in reached:
        if written.part is None and len(gradient) != batch:
            raise UnsupportedModelError(
                f"{written.name} of {anatomy.model} writes to the text's residual stream directly "
                "though it attends to pieces of images, whose prompts cannot be told. Give text "
                "alone."
            )
        if written.kind == "embeddings":
            columns[written.name] = (written.tensor.detach().double() * gradient.double()).sum(-1)
        elif written.call is not None:
            share = _by_source(anatomy[written.name], written, gradient)
            before = columns.get(written.name)
            columns[written.name] = share if before is None else before + share
    return columns


@torch.no_grad()
def _by_source(
    site: Site, written: Written, gradient: Float[Tensor, "batch query head d_v"]
) -> Float[Tensor, "batch key"]:
    """`sum over heads and rows of A[t, s] v_s . dM/dz_t`, by blocks of the rows with a gradient."""
    assert written.call is not None
    rows = Rows.summing(site, written.call)
    value = written.call.value.detach()
    shares = value.new_zeros(value.shape[0], value.shape[2], dtype=torch.float64)
    used = gradient.abs().amax((0, 2, 3)).nonzero()[:, 0].tolist()
    if not used:
        return shares
    values = value.repeat_interleave(site.heads // site.groups, dim=1)
    for block in rows.blocks(rows=slice(used[0], used[-1] + 1)):
        keys = rows.keys_seen(block)
        pattern = rows.pattern(rows.scores(block, keys), block, keys)
        worth = torch.einsum("bthv,bhsv->bhts", gradient[:, block], values[:, :, keys])
        shares[:, keys] += (pattern.double() * worth.double()).sum((1, 2))
    return shares
