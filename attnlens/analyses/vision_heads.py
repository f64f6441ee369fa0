"""Heads that read the image: how far their output moves when the image tokens are hidden.

He et al. 2025, Cracking the code of hallucination in LVLMs with vision-aware head divergence (VHD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.analyses.per_head import HeadTable, table_of
from attnlens.analyses.uncertainty import check_bootstrap
from attnlens.analyses.vision import image_positions, language_sites
from attnlens.anatomy import HeadSpec, Site
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer
from attnlens.hooks.tokens import Sides
from attnlens.kernels.rows import hidden_value
from attnlens.lens import Batch, Inputs, Lens
from attnlens.lens.inputs import split

RowChoice = Literal["text", "last"]
NUMBERS = ("divergence", "relative", "image_mass")


@dataclass(frozen=True)
class VisionAwareHeads(HeadTable):
    """Per head of the text: `divergence`, `relative` and `image_mass`.

    `divergence` is `mean_t |z_t - z'_t|`, the distance of the head's outputs with the image and
    with the image tokens hidden; `relative` is `mean_t |z_t - z'_t| / |z_t|`; `image_mass` is the
    mean weight on image tokens.
    """

    image_tokens: tuple[int, ...]
    """Number of image tokens of each prompt."""
    rows: RowChoice
    """Which rows t count: those of text after the first image token, or the last row alone."""
    notes: tuple[str, ...]

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.image_tokens)


def vision_aware_heads(
    lens: Lens,
    inputs: Inputs,
    image_mask: Bool[Tensor, "prompt position"] | None = None,
    rows: RowChoice = "text",
    layers: HeadSpec | int | None = None,
    batch_size: int = 4,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> VisionAwareHeads:
    """How far each head's output z moves when no head of any layer sees an image token.

    `VHD_h = mean_t |z_t - z'_t|`. z' is of a run in which the keys of image tokens are hidden
    before the softmax, in every layer that works on text, so that the weights of a row spread over
    its text; text keeps its positions. (He et al. leave the image tokens out of the prompt, which
    also moves the text after them forward.) In cross-attention to images all keys are hidden:
    z' = 0. Both runs share one batch and are compared layer by layer; no map and no z is kept.
    Image tokens are those of the config's image token id, or of `image_mask`.

    Raises:
        InputError: no image tokens, or unknown `rows`.
        UnsupportedModelError: a model with an encoder and a decoder.

    """
    if rows not in ("text", "last"):
        raise InputError(f"There are no rows {rows!r}; choose 'text' or 'last'.")
    check_bootstrap(resamples, confidence)
    whole = lens.encode(inputs)
    if whole.sides.decoder is not None:
        raise UnsupportedModelError(
            f"{lens.anatomy.model} reads its images in an encoder; image tokens are hidden in "
            "models that read them among the tokens of one text."
        )
    image = image_positions(lens, whole, image_mask)
    parts, order = split(whole, batch_size)
    found: list[dict[str, Tensor]] = []
    heads = None
    start = 0
    for part in parts:
        prompts = order[start : start + part.size]
        start += part.size
        twice = doubled(part)
        anatomy = lens.anatomy_for(twice)
        every = language_sites(anatomy.sites, twice.sides)
        counted = language_sites(anatomy.layers(layers), twice.sides)
        assert part.ids is not None
        compared = _Compared(every, part, image[prompts, : part.ids.shape[1]], rows)
        lens.observe(twice, compared)
        found.append(compared.values(counted))
        heads = tuple(site.head(head) for site in counted for head in range(site.heads))
    assert heads is not None
    back = torch.tensor(order).argsort()
    values = {name: torch.cat([own[name] for own in found])[back] for name in NUMBERS}
    names, interval = table_of(values, resamples, confidence, seed)
    notes = ("One prompt gives no interval over prompts; give several.",) if whole.size < 2 else ()
    counts = tuple(image.sum(-1).tolist())
    return VisionAwareHeads(heads, names, *interval, image_tokens=counts, rows=rows, notes=notes)


def doubled(part: Batch) -> Batch:
    """Every prompt twice: first all of them, then all again."""
    inputs = {
        name: torch.cat([value, value], 1 if _by_second_axis(name, value, part) else 0)
        if isinstance(value, Tensor) and value.ndim
        else value
        for name, value in part.inputs.items()
    }
    return Batch(inputs, Sides.of(inputs), part.tokens * 2)


def _by_second_axis(name: str, value: Tensor, part: Batch) -> bool:
    """Positions in several coordinates have these before the prompts."""
    return name == "position_ids" and value.ndim == 3 and value.shape[1] == part.size


class _Compared(Observer):
    """Observer of a doubled batch: hides images from its second half, and compares the halves."""

    def __init__(self, sites: Sequence[Site], part: Batch, image: Tensor, rows: RowChoice) -> None:
        self.sites = frozenset(site.name for site in sites)
        self._image = image
        self._counted = _counted_rows(part, image, rows)
        self._found: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def see(self, site: Site, call: Call) -> Call:
        """Hide the image tokens from the second half, and note how far z moves."""
        prompts, length = self._image.shape
        if call.query.shape[0] != 2 * prompts or call.query.shape[2] != length:
            raise UnsupportedModelError(
                f"The rows of {site.name} are not the positions of the text, so its images cannot "
                "be told from them. Name the layers of the text."
            )
        keys = call.key.shape[2]
        image = self._image if keys == length else self._image.new_ones(prompts, keys)
        rows = Rows.at(site, call)
        output = call.output.clone()
        mass = torch.empty(prompts, site.heads, length, dtype=torch.float64, device=output.device)
        for prompt in range(prompts):
            mass[prompt] = _mass(rows.prompt(prompt), image[prompt])
            blind = prompts + prompt
            value = call.value[blind].repeat_interleave(site.heads // site.groups, 0)
            z = _z_without(rows.prompt(blind), value, image[prompt])
            output[blind] = z.transpose(0, 1).to(output.dtype)
        self._found[site.name] = self._compare(output[:prompts], output[prompts:], mass)
        return replace(call, output=output)

    def _compare(
        self,
        z: Float[Tensor, "batch query head d_v"],
        without: Float[Tensor, "batch query head d_v"],
        mass: Float[Tensor, "batch head query"],
    ) -> dict[str, Tensor]:
        moved = (z.double() - without.double()).norm(dim=-1).transpose(1, 2)
        size = z.double().norm(dim=-1).transpose(1, 2)
        relative = torch.where(size > 0, moved / size, 0)
        return {
            name: self._mean(values)
            for name, values in zip(NUMBERS, (moved, relative, mass), strict=True)
        }

    def _mean(self, values: Float[Tensor, "batch head query"]) -> Float[Tensor, "batch head"]:
        counted = self._counted[:, None]
        total = values.masked_fill(~counted, 0).sum(-1) / counted.sum(-1)
        return total.cpu()

    def values(self, sites: Sequence[Site]) -> dict[str, Float[Tensor, "prompt head"]]:
        """The numbers of the heads of some sites, side by side."""
        return {
            name: torch.cat([self._found[site.name][name] for site in sites], 1) for name in NUMBERS
        }


def _counted_rows(part: Batch, image: Tensor, rows: RowChoice) -> Bool[Tensor, "batch query"]:
    """The rows that count: real text after the first image token, all of it or the last one."""
    after = image.int().cumsum(-1) > 0
    text = after & ~image if part.real is None else after & ~image & part.real
    if rows == "text":
        return text
    last = text.int().cumsum(-1)
    return text & (last == last[:, -1:])


def _mass(rows: Rows, image: Bool[Tensor, " key"]) -> Float[Tensor, "head query"]:
    """Weight of each row on image keys."""
    column = image[:, None].to(torch.promote_types(rows.query.dtype, torch.float32))
    parts = [
        pattern.to(column.dtype) @ column[keys]
        for part in rows.blocks()
        for pattern, keys in (rows.block(slice(0, rows.shape[1]), part),)
    ]
    return torch.cat(parts, 2)[0, ..., 0]


def _z_without(
    rows: Rows, value: Float[Tensor, "head key d_v"], image: Bool[Tensor, " key"]
) -> Float[Tensor, "head query d_v"]:
    """z of every row with the image keys hidden before the softmax; 0 where nothing is left."""
    parts: list[Tensor] = []
    for part in rows.blocks():
        keys = rows.keys_seen(part)
        scores = rows.scores(part, keys)
        scores = scores.masked_fill(image[keys], hidden_value(scores.dtype))
        pattern = rows.pattern(scores, part, keys).masked_fill(image[keys], 0)
        parts.append(pattern[0].to(value.dtype) @ value[:, keys])
    return torch.cat(parts, 1)
