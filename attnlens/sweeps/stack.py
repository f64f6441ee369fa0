"""Edits of several trials in one forward: each trial has a copy of the batch of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.hooks.edits import Edit, Editor
from attnlens.hooks.edits.editor import FindMlps
from attnlens.hooks.seam import Asked, Call
from attnlens.hooks.session import Handle, Observer


class Stack(Observer):
    """Observer that applies the edits of trial i to rows `[i * size, (i + 1) * size)` of a batch.

    `inputs` are those of one copy, `size` its prompts; rows begin at position `first`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        trials: Sequence[Sequence[Edit]],
        inputs: Mapping[str, Any],
        size: int,
        find_mlps: FindMlps | None,
        first: int = 0,
    ) -> None:
        self._copies = [slice(i * size, (i + 1) * size) for i in range(len(trials))]
        self._editors = [Editor(anatomy, edits, find_mlps) for edits in trials]
        for editor in self._editors:
            editor.running.begin(inputs, first)
        self.sites = frozenset[str]().union(*(editor.sites for editor in self._editors))

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hook the streams that some trial edits."""
        places: dict[tuple[str, str], Editor] = {}
        for editor in self._editors:
            places |= dict.fromkeys(editor.stream_places, editor)
        return [own.hook_stream(model, *place, self._change) for place, own in places.items()]

    def z_at(self, site: Site, clean: Call) -> Float[Tensor, "copies query head d_v"]:
        """z of a site in every copy, made from the clean run's call; the run may skip it."""
        self.sites -= {site.name}
        found: list[Tensor] = []
        for editor in self._editors:
            asked = editor.enter(site, clean)
            call = clean if asked is clean else Call.of(asked)
            found.append(editor.see(site, call).output)
        return torch.cat(found)

    def enter(self, site: Site, asked: Asked) -> Asked:
        """Change q, k and v of each copy."""
        own = [_rows_of(asked, rows) for rows in self._copies]
        changed = [e.enter(site, part) for e, part in zip(self._editors, own, strict=True)]
        if all(one is other for one, other in zip(own, changed, strict=True)):
            return asked
        return replace(
            asked,
            query=torch.cat([part.query for part in changed]),
            key=torch.cat([part.key for part in changed]),
            value=torch.cat([part.value for part in changed]),
        )

    def see(self, site: Site, call: Call) -> Call:
        """Change scores, pattern and z of each copy; of these only z goes on."""
        output = call.output.clone()
        for editor, rows in zip(self._editors, self._copies, strict=True):
            if site.name in editor.sites:
                output[rows] = editor.see(site, _rows_of(call, rows)).output
        return replace(call, output=output)

    def _change(self, stream: str, site: Site, tensor: Tensor) -> Tensor:
        changed = [
            editor.change_stream(stream, site, tensor[rows])
            for editor, rows in zip(self._editors, self._copies, strict=True)
        ]
        return torch.cat(changed)


_Kind = TypeVar("_Kind", bound=Asked)


def _rows_of(asked: _Kind, rows: slice) -> _Kind:
    """A call cut to some rows of its batch."""

    def part(value: Any) -> Any:
        # Of what a kernel is given, tensors of four axes have one for prompts: queries, keys,
        # values, masks and biases. Learned sinks may be as many as there are rows, by chance.
        whole = isinstance(value, Tensor) and value.ndim == 4
        return value[rows] if whole and value.shape[0] == asked.query.shape[0] else value

    cut: dict[str, Any] = {
        field.name: part(getattr(asked, field.name))
        for field in fields(asked)
        if field.name not in ("module", "arguments")
    }
    cut["arguments"] = {name: part(value) for name, value in asked.arguments.items()}
    return replace(asked, **cut)
