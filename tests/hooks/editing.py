"""What tests of edits share: small models that no test changes, and one edit of each kind."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

import attnlens as al
from attnlens.hooks.edits import Edit
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES

IDS = torch.arange(20, 32)[None]
OTHER = torch.arange(40, 52)[None]


def new_lens(name: str, kernel: str | None = None) -> Lens:
    """A model of its own, for tests that change its weights or its dtype."""
    model = ARCHITECTURES[name].build()
    if kernel is not None:
        model.set_attn_implementation(kernel)
    return Lens(model, example=ARCHITECTURES[name].inputs(model))


lens = cache(new_lens)
"""A model that all tests share."""


def logits(subject: Lens, ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return subject.model(input_ids=ids, **inputs).logits


def kept(subject: Lens, *kinds: str, ids: Tensor = OTHER) -> al.Trace:
    return subject.run(ids, keep=kinds)


def every_edit(subject: Lens, at: str = "L0H1") -> list[Edit]:
    """One edit of each kind, of one head (or of its layer's stream)."""
    site = subject.anatomy[at.partition("H")[0]]
    theirs = kept(subject, "q", "k", "v", "z", "pattern", "residual")
    dtype = theirs.z[site.name].dtype
    q, k, v, z = (
        {site.name: torch.linspace(-1, 1, heads * size).view(heads, size).to(dtype)}
        for heads, size in (
            (site.heads, site.d_qk),
            (site.groups, site.d_qk),
            (site.groups, site.d_v),
            (site.heads, site.d_v),
        )
    )
    patches = [al.Patch(at, kind, theirs[kind]) for kind in ("q", "k", "v", "z", "pattern")]
    return [
        al.Zero(at),
        al.Scale(at, 0.5),
        al.Mean(at, subject.mean_z(OTHER)),
        al.Uniform(at),
        al.Identity(at),
        al.Identity(at, 0.25),
        al.Bias(at, 0.7, keys=[0, 2]),
        al.Hide(at, keys=slice(1, 4)),
        al.Drop(at, keys=slice(1, 4)),
        *patches,
        al.Steer(at, "q", q),
        al.Steer(at, "k", k),
        al.Steer(at, "v", v),
        al.Steer(at, "z", z),
        al.PatchStream(site.name, values=theirs.residual),
        al.SteerStream(site.name, vectors={site.name: torch.ones(32).to(dtype)}),
        al.SteerStream(site.name, stream="mlp", vectors={site.name: torch.ones(32).to(dtype)}),
    ]


COUNT = 21


def every_edit_of(subject: Lens, other: Tensor, inputs: dict[str, Tensor]) -> list[Edit]:
    """As `every_edit`, with what is kept of a text of its own length."""
    edits = every_edit(subject)
    kinds = ("q", "k", "v", "z", "pattern", "residual")
    theirs = subject.run({"input_ids": other, **inputs}, keep=kinds)
    found: list[Edit] = []
    for edit in edits:
        if isinstance(edit, al.Patch):
            edit = replace(edit, values=theirs[edit.kind])
        elif isinstance(edit, al.PatchStream):
            edit = replace(edit, values=theirs.residual)
        found.append(edit)
    return found
