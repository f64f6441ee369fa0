"""Edits put to a running model: each at its sites, in the order given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Head, Site
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.edits.base import Edit, HeadEdit, StreamEdit
from attnlens.hooks.residual import Passing, Stream
from attnlens.hooks.seam import Asked, Call
from attnlens.hooks.session import Handle, Observer
from attnlens.hooks.where import Running, Where

FindMlps = Callable[[], Mapping[str, str]]
"""Names of the modules whose output is what an MLP adds to the stream, by block."""

ChangeStream = Callable[[str, Site, Tensor], Tensor]
"""(stream, site, `batch row d_model`) -> the stream as edited."""


class Editor(Observer):
    """Observer that applies edits at their sites.

    Changes of q, k and v act before attention is computed, all others after it. Like a session, it
    leaves passes of other threads alone.
    """

    def __init__(
        self, anatomy: Anatomy, edits: Sequence[Edit], find_mlps: FindMlps | None = None
    ) -> None:
        if not edits:
            raise InputError("No edit was given. For example lens.edit(al.Zero('L3H5')).")
        for edit in edits:
            if not isinstance(edit, HeadEdit | StreamEdit):
                raise InputError(
                    f"What is of type {type(edit).__name__} is no edit. Give edits one by one: "
                    "lens.edit(al.Zero('L3H5'), al.Scale('L4', 0.5)), or lens.edit(*edits)."
                )
        self.running = Running()
        self.sites = frozenset(name for edit in edits for name in edit.sites(anatomy))
        self._anatomy = anatomy
        self._heads = [
            (edit, heads_by_site(anatomy.find(edit.heads)))
            for edit in edits
            if isinstance(edit, HeadEdit)
        ]
        self._streams = [edit for edit in edits if isinstance(edit, StreamEdit)]
        # The model runs once to find them: before a session listens.
        writes = any(edit.stream == "mlp" for edit in self._streams)
        self._mlps = find_mlps() if writes and find_mlps is not None else {}
        self._numbers: dict[tuple[int, str], Tensor] = {}

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Listen at the model's inputs; hook the blocks and MLPs whose stream is edited."""
        hooks = [self.hook_stream(model, *at, self.change_stream) for at in self.stream_places]
        return [*self.running.attach(model), *hooks]

    @property
    def stream_places(self) -> tuple[tuple[str, str], ...]:
        """(stream, site name) of every stream that is edited."""
        places = [(e.stream, name) for e in self._streams for name in e.sites(self._anatomy)]
        return tuple(dict.fromkeys(places))

    def change_stream(self, stream: str, site: Site, tensor: Tensor) -> Tensor:
        """Apply the edits of one stream at a site's block."""
        for edit in self._streams:
            here = edit.stream == stream and site.name in edit.sites(self._anatomy)
            if here and self.running.in_phase(edit.phase):
                rows, start = self.running.rows_of_stream(site, tensor, edit.queries)
                tensor = edit.change(site, tensor, rows, start)
        return tensor

    def enter(self, site: Site, asked: Asked) -> Asked:
        """Apply the edits of q, k and v."""
        for edit, where in self._at(site, asked):
            asked = edit.enter(site, asked, where)
        return asked

    def see(self, site: Site, call: Call) -> Call:
        """Apply the edits of scores, pattern and z."""
        for edit, where in self._at(site, call):
            call = edit.see(site, call, where)
        return call

    def _at(self, site: Site, asked: Asked) -> list[tuple[HeadEdit, Where]]:
        found: list[tuple[HeadEdit, Where]] = []
        for index, (edit, heads) in enumerate(self._heads):
            if site.name in heads and self.running.in_phase(edit.phase):
                key = index, site.name
                if key not in self._numbers:
                    self._numbers[key] = torch.tensor(heads[site.name], device=asked.query.device)
                numbers = self._numbers[key].to(asked.query.device)
                where = self.running.at(site, asked, numbers, edit.queries, edit.key_positions)
                if where.rows is None or bool(where.rows.any()):
                    found.append((edit, where))
        return found

    def hook_stream(self, model: nn.Module, stream: str, name: str, change: ChangeStream) -> Handle:
        """Put `change` to a stream at the block of a site, in passes of this thread."""
        site = self._anatomy[name]
        if site.block is None:
            raise UnsupportedModelError(
                f"{self._anatomy.model} has no block around {name}, so its {stream} cannot be "
                "edited there."
            )
        if stream == "mlp" and site.block not in self._mlps:
            raise UnsupportedModelError(
                f"No MLP was found in {site.block} of {self._anatomy.model} whose output is added "
                "to the residual stream; edit the stream that enters the next layer instead."
            )
        return Passing(
            model,
            self._anatomy,
            [Stream(site)],
            lambda _, tensor: change(stream, site, tensor),
            self._mlps if stream == "mlp" else None,
            strict=True,
        )


def heads_by_site(heads: Sequence[Head]) -> dict[str, list[int]]:
    """Head numbers by site name."""
    found: dict[str, list[int]] = {}
    for head in heads:
        found.setdefault(head.site, []).append(head.head)
    return found
