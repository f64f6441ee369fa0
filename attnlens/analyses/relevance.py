"""Relevance propagation: what each token, head, layer and attention edge had in an output.

AttnLRP (Achtibat et al. 2024, AttnLRP: attention-aware layer-wise relevance propagation) and CP-LRP
(Ali et al. 2022, XAI for transformers: better explanations through conservative propagation), both
as gradient x input under other backward rules: one forward and one backward for all of it.

    R(x) = sum over the width of x . dM/dx

The ledger says where the rest went. CP-LRP conserves: tokens, positions and biases sum to the
explained value. AttnLRP sends relevance through the softmax, too, which keeps some: the ledger's
`softmax` is the sum over layers and heads of R(A) - R(scores), and makes the sum exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attribution import Attribution, Ledger, joined, over_tokens, places_of
from attnlens.analyses.target import Explained, TargetSpec, settle
from attnlens.anatomy import Anatomy, Site
from attnlens.errors import BudgetError, InputError, UnsupportedModelError
from attnlens.hooks.backward import ATTNLRP, CP_LRP, MixedPromptsError, Relevances, Rule, relevances
from attnlens.hooks.keep import gigabytes
from attnlens.hooks.residual import FINAL
from attnlens.lens import Batch, Inputs, Lens, SiteTensors
from attnlens.lens.asked import Maps, choose, choose_maps, parse_bytes
from attnlens.lens.inputs import split


def attnlrp(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    *,
    maps: Maps = None,
    batch_size: int = 8,
    checkpoint: bool = False,
    strict: bool = True,
    budget: str | float = "2GB",
) -> Attribution:
    """Relevance by the rules of AttnLRP: half of `A V` to each, softmax plain, `f(x)/x` constant.

    Args:
        lens: the model.
        inputs: prompts.
        target: what is explained; the likeliest next token where None.
        maps: layers whose attention edges are scored, `batch head query key`; True for all.
        batch_size: prompts that run at a time.
        checkpoint: compute each block's inner values again in the backward pass, to save memory.
        strict: refuse a model in which relevance is not conserved; else the remainder is shown.
        budget: bytes that the maps may take.

    Scores are those of the positions as they enter the first block (token and position embeddings
    together), of the token embeddings where that is not seen; the ledger tells them apart.

    Raises:
        BudgetError: maps over the budget.
        InputError: a target that is not there, or without a gradient.
        UnsupportedModelError: relevance is not conserved, in the module that is named.

    """
    asked = _Asked(ATTNLRP, maps, batch_size, checkpoint, strict, parse_bytes(budget))
    return _propagate(lens, inputs, target, asked)


def cp_lrp(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    *,
    maps: Maps = None,
    batch_size: int = 8,
    checkpoint: bool = False,
    strict: bool = True,
    budget: str | float = "2GB",
) -> Attribution:
    """Relevance by the rules of CP-LRP: attention weights are constants, all of `A V` goes to V.

    Nothing reaches a token through queries and keys. Arguments and errors are those of `attnlrp`.
    """
    asked = _Asked(CP_LRP, maps, batch_size, checkpoint, strict, parse_bytes(budget))
    return _propagate(lens, inputs, target, asked)


@dataclass(frozen=True)
class _Asked:
    """What a propagation was asked for."""

    rule: Rule
    maps: Maps
    batch_size: int
    checkpoint: bool
    strict: bool
    budget: int


def _propagate(lens: Lens, inputs: Inputs, target: TargetSpec, asked: _Asked) -> Attribution:
    note = check_conserved(lens, asked.strict)
    batch = lens.encode(inputs)
    explained = settle(lens, batch, target)
    anatomy = lens.anatomy_for(batch)
    kept = choose_maps(anatomy, choose(anatomy, None, None), asked.maps)
    sites = [anatomy[name] for name in kept]
    _check_price(lens, batch, sites, asked.budget)
    parts: list[Attribution] = []
    start = 0
    together = batch.size if sites else asked.batch_size  # maps are in the padded input
    for part in split(batch, together, by_length=False)[0]:
        own = explained.part(slice(start, start + part.size))
        parts += _run(lens, part, own, asked, sites)
        start += part.size
    whole = joined(parts)
    settings = {"rule": asked.rule.name, "strict": asked.strict}
    return replace(whole, target=explained.names, settings=settings, notes=(*whole.notes, *note))


def check_conserved(lens: Lens, strict: bool) -> tuple[str, ...]:
    """Refuse a model in which relevance is not conserved, or say so in a note.

    Raises:
        UnsupportedModelError: it is not, and `strict`; the module is named.

    """
    found = lens.conservation
    if found.closes:
        return ()
    if strict:
        raise UnsupportedModelError(
            f"Relevance cannot be trusted in {lens.anatomy.model}: {found}. Explain it by "
            'al.attribute(..., method="input_gradient"), or pass strict=False and read the ledger.'
        )
    return (f"Not to be trusted: {found}.",)


def _run(
    lens: Lens, batch: Batch, explained: Explained, asked: _Asked, sites: Sequence[Site]
) -> list[Attribution]:
    """One batch; prompts one by one where the model mixes their rows."""
    anatomy = lens.anatomy_for(batch)
    try:
        found = relevances(
            lens.model, anatomy, batch.inputs, explained.metric, asked.rule,
            explained.observers(lens, batch), [site.name for site in sites], asked.checkpoint,
        )  # fmt: skip
    except MixedPromptsError:
        if sites:
            raise InputError(
                f"{anatomy.model} mixes the rows of its prompts: ask for maps of one at a time."
            ) from None
        alone = split(batch, 1, by_length=False)[0]
        each = [explained.part(slice(n, n + 1)) for n in range(batch.size)]
        return [
            one
            for part, own in zip(alone, each, strict=True)
            for one in _run(lens, part, own, asked, sites)
        ]
    return [_attribution(lens, batch, anatomy, found, asked.rule)]


def _attribution(
    lens: Lens, batch: Batch, anatomy: Anatomy, found: Relevances, rule: Rule
) -> Attribution:
    """What one run found, by real tokens."""
    text, decoder, seen = _by_position(batch, anatomy, found)
    words, scores = over_tokens(lens, batch, text, decoder)
    layer_names, layers = _layers(lens, batch, anatomy, found)
    heads = [
        values.reshape(batch.size, -1, values.shape[-1]).sum(1) for values in found.heads.values()
    ]
    names = tuple(
        anatomy[name].head(number)
        for name, values in found.heads.items()
        for number in range(values.shape[-1])
    )
    ledger = Ledger(found.value, _entries(found))
    return Attribution(
        method=rule.name,
        tokens=words,
        scores=scores,
        target=(),
        value=found.value,
        layers=layers,
        layer_names=layer_names,
        heads=torch.cat(heads, dim=1) if heads else None,
        head_names=names,
        maps=SiteTensors(found.maps) if found.maps else None,
        places=places_of(batch),
        ledger=ledger,
        notes=() if seen else (_EMBEDDINGS,),
    )


_EMBEDDINGS = (
    "Scores are of the token embeddings: the first block's input was not seen as positions of the "
    "prompt."
)


def _entries(found: Relevances) -> dict[str, Tensor]:
    """The ledger; `target` is what a function that is no sum of logits does not hand down."""
    order = ("tokens", "inputs", "positions", "biases", "softmax")
    entries = {name: found.entries[name] for name in order if name in found.entries}
    return entries | {"target": found.beyond} if bool(found.beyond.any()) else entries


def _by_position(
    batch: Batch, anatomy: Anatomy, found: Relevances
) -> tuple[Tensor, Tensor | None, bool]:
    """Relevance of the text's positions and a decoder's, and whether the blocks' input was seen."""
    streams = _entering(batch, anatomy, found)
    text = streams.get("text", found.text)
    if text is None:  # an encoder of sounds or images, whose positions are no tokens
        text = next(iter(found.streams.values()), None)
    if text is None:
        raise UnsupportedModelError(
            f"{anatomy.model} has neither tokens nor a list of blocks, so there is no position to "
            "score."
        )
    return text, streams.get("decoder", found.decoder), "text" in streams or found.text is None


def _entering(batch: Batch, anatomy: Anatomy, found: Relevances) -> dict[str, Tensor]:
    """The streams that enter the first blocks of the sides, where they are the side's positions."""
    streams: dict[str, Tensor] = {}
    for site in anatomy.sites:
        own = found.streams.get(site.name)
        first = site.block is not None and site.block.rpartition(".")[2] == "0"
        if own is None or not first or site.kind == "cross":
            continue
        tokens = batch.sides.queries(site)
        if tokens.ids is not None and tokens.ids.shape == own.shape:
            streams["decoder" if tokens is batch.sides.decoder else "text"] = own
    return streams


def _layers(
    lens: Lens, batch: Batch, anatomy: Anatomy, found: Relevances
) -> tuple[tuple[str, ...], Float[Tensor, "batch layer position"] | None]:
    """The streams of the stack that reads the text (or the image), and what leaves it."""
    first = next((name.rpartition(".L")[0] for name in found.streams), "")
    own = [site.name for site in anatomy.sites if site.stack == first]
    own.append(f"{first}.{FINAL}" if first else FINAL)
    names = [name for name in own if name in found.streams]
    shapes = {found.streams[name].shape for name in names}
    if len(shapes) != 1 or next(iter(shapes))[0] != batch.size:
        return (), None
    stacked = torch.stack([found.streams[name] for name in names], dim=1)
    return tuple(names), over_tokens(lens, batch, stacked)[1]


def _check_price(lens: Lens, batch: Batch, sites: Sequence[Site], budget: int) -> None:
    extents = batch.extents(lens.anatomy_for(batch))
    size = max(4, next(lens.model.parameters()).element_size())
    known = [(site, extents[site.name]) for site in sites if site.name in extents]
    needed = sum(size * site.heads * e.batch * e.queries * e.keys for site, e in known)
    if needed > budget:
        raise BudgetError(
            f"Relevance of all edges of {len(sites)} layers takes {gigabytes(needed)}, over the "
            f"budget of {gigabytes(budget)}. Ask for fewer layers (maps={sites[-1].name!r}) or "
            "prompts, or give a larger one: budget='8GB'."
        )
