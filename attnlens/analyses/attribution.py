"""The result of every attribution method: scores of input tokens, and where the rest went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.analyses.per_head import head_frame
from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.graphs.relevance import relevance_graph
from attnlens.hooks.residual import FINAL
from attnlens.hooks.tokens import Tokens
from attnlens.lens import Batch, Lens, SiteTensors


@dataclass(frozen=True)
class Ledger:
    """Where an explained value went: entries and remainder sum to it, prompt by prompt."""

    value: Float[Tensor, " batch"]
    """The explained value, in float64."""
    entries: Mapping[str, Float[Tensor, " batch"]]
    """What each part took, signed: `tokens`, `positions`, `biases`, `softmax`, ..."""

    @property
    def remainder(self) -> Float[Tensor, " batch"]:
        """What no entry accounts for: `value - sum of entries`."""
        return self.value - torch.stack(list(self.entries.values())).sum(0)

    @property
    def error(self) -> Float[Tensor, " batch"]:
        """The remainder against the largest of value and entries, which does not vanish with it."""
        parts = torch.stack([self.value, *self.entries.values()]).abs()
        largest = parts.amax(0)
        return self.remainder.abs() / torch.where(largest > 0, largest, 1)

    def to_frame(self) -> pd.DataFrame:
        """One row a prompt: value, each entry, remainder, error."""
        columns = {"value": self.value, **self.entries}
        columns |= {"remainder": self.remainder, "error": self.error}
        return pd.DataFrame({name: column.tolist() for name, column in columns.items()})


@dataclass(frozen=True)
class Attribution:
    """Signed scores of input tokens for a target; padding is 0 and stands at the right."""

    method: str
    tokens: tuple[tuple[str, ...], ...]
    """Texts of the positions that are scored, of each prompt, without padding; a decoder's own
    tokens come after those of the text that its encoder reads."""
    scores: Float[Tensor, "batch position"]
    target: tuple[str, ...]
    """What was explained of each prompt."""
    value: Float[Tensor, " batch"]
    """The explained value of each prompt."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What changes the answer, by name."""
    layers: Float[Tensor, "batch layer position"] | None = None
    """Scores of the residual stream that enters each layer, and of what leaves the last."""
    layer_names: tuple[str, ...] = ()
    heads: Float[Tensor, "batch head"] | None = None
    """Scores of heads, summed over positions, in the order of `head_names`."""
    head_names: tuple[Head, ...] = ()
    maps: SiteTensors | None = None
    """Scores of attention edges by site, `batch head query key` in the padded input; if asked."""
    places: tuple[tuple[int, ...], ...] = ()
    """Where each prompt's tokens stand in the padded input; empty where that is at its start."""
    ledger: Ledger | None = None
    notes: tuple[str, ...] = ()
    make_graph: Callable[[int], nx.MultiDiGraph[str]] | None = field(
        default=None, repr=False, compare=False
    )

    def of(self, prompt: int) -> Float[Tensor, " position"]:
        """The scores of one prompt, without padding."""
        return self.scores[prompt, : len(self.tokens[prompt])]

    def graph(self, prompt: int = 0) -> nx.MultiDiGraph[str]:
        """What the method traces for one prompt, else the strongest of the edges in `maps`.

        Raises:
            InputError: the method traces no graph, and no maps were asked for.

        """
        if self.make_graph is not None:
            return self.make_graph(prompt)
        if self.maps is None:
            raise InputError(
                f"{self.method} traces no graph, and scores of edges were not asked for. Attention "
                "flow, rollout and routes trace one; attnlrp, cp_lrp and the attention gradients "
                'have one of their edges with maps (al.attnlrp(..., maps="all")).'
            )
        rows = [n for n, name in enumerate(self.layer_names) if name in {*self.maps, FINAL}]
        known = self.layers is not None and set(self.maps) <= set(self.layer_names)
        streams = self.layers[prompt, rows] if self.layers is not None and known else None
        places = self.places[prompt] if self.places else None
        said = {"method": self.method, "target": self.target[prompt]}
        return relevance_graph(
            self.maps, self.tokens[prompt], prompt, streams=streams, positions=places,
            attributes=said,
        )  # fmt: skip

    def to_frame(self, prompt: int = 0) -> pd.DataFrame:
        """One row a token: position, token, score."""
        words = self.tokens[prompt]
        scores = self.of(prompt).double().tolist()
        return pd.DataFrame({"position": range(len(words)), "token": words, "score": scores})

    def heads_frame(self, prompt: int = 0) -> pd.DataFrame:
        """One row a head: head, site, layer, index, score; InputError where there are none."""
        if self.heads is None:
            raise InputError(f"{self.method} scores no heads.")
        return head_frame(self.head_names, {"score": self.heads[prompt].double()})

    def layers_frame(self, prompt: int = 0) -> pd.DataFrame:
        """One row a layer and token: layer, position, token, score; InputError where none."""
        if self.layers is None:
            raise InputError(f"{self.method} scores no layers.")
        words = self.tokens[prompt]
        rows = [
            (name, position, word, score)
            for name, row in zip(self.layer_names, self.layers[prompt].tolist(), strict=True)
            for position, (word, score) in enumerate(zip(words, row, strict=False))
        ]
        return pd.DataFrame(rows, columns=["layer", "position", "token", "score"])


def over_tokens(
    lens: Lens,
    batch: Batch,
    text: Float[Tensor, "batch *axes position"],
    decoder: Float[Tensor, "batch *axes decoder_position"] | None = None,
) -> tuple[tuple[tuple[str, ...], ...], Float[Tensor, "batch *axes scored"]]:
    """Scores of padded positions as those of real tokens, at the left, with their texts.

    An encoder-decoder's own tokens come after those of the text that it reads.
    """
    sides = [(text, batch.sides.text)]
    if decoder is not None:
        sides.append((decoder, batch.sides.decoder or Tokens()))
    words: list[tuple[str, ...]] = []
    rows: list[Tensor] = []
    for prompt in range(len(text)):
        own: list[str] = []
        kept: list[Tensor] = []
        for values, side in sides:
            tokens = side.cut(values.shape[-1])
            row = values[prompt]
            kept.append(row if tokens.real is None else row[..., tokens.real[prompt]])
            own += _texts(lens, tokens, prompt, kept[-1].shape[-1])
        words.append(tuple(own))
        rows.append(torch.cat(kept, dim=-1))
    longest = max(row.shape[-1] for row in rows)
    padded = [nn.functional.pad(row, (0, longest - row.shape[-1])) for row in rows]
    return tuple(words), torch.stack(padded)


def places_of(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Where each prompt's tokens stand in the padded input; empty where nothing is padded."""
    if batch.real is None:
        return ()
    return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in batch.real)


def joined(parts: Sequence[Attribution]) -> Attribution:
    """The attributions of batches as one; `maps`, which belong to one padded input, of one batch.

    Notes are kept once each; all else but the tensors is that of the first.
    """
    first = parts[0]
    if len(parts) == 1:
        return first

    def all_of(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        if any(tensor is None for tensor in tensors):
            return None
        longest = max(tensor.shape[-1] for tensor in tensors)
        return torch.cat([nn.functional.pad(t, (0, longest - t.shape[-1])) for t in tensors])

    scores = all_of("scores")
    assert scores is not None
    ledgers = [part.ledger for part in parts if part.ledger is not None]
    return replace(
        first,
        tokens=tuple(own for part in parts for own in part.tokens),
        scores=scores,
        target=tuple(own for part in parts for own in part.target),
        value=torch.cat([part.value for part in parts]),
        layers=all_of("layers"),
        heads=all_of("heads"),
        ledger=_joined_ledger(ledgers) if len(ledgers) == len(parts) else None,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _joined_ledger(parts: Sequence[Ledger]) -> Ledger:
    """Ledgers one after another; an entry that one does not have is 0 there."""
    names = dict.fromkeys(name for part in parts for name in part.entries)
    entries = {
        name: torch.cat([part.entries.get(name, torch.zeros_like(part.value)) for part in parts])
        for name in names
    }
    return Ledger(torch.cat([part.value for part in parts]), entries)


def _texts(lens: Lens, tokens: Tokens, prompt: int, count: int) -> list[str]:
    """Texts of a prompt's tokens, or numbers where the input has none (patches of an image)."""
    if tokens.ids is None:
        return [str(position) for position in range(count)]
    ids = tokens.ids[prompt]
    return list(
        lens.token_texts((ids if tokens.real is None else ids[tokens.real[prompt]]).tolist())
    )
