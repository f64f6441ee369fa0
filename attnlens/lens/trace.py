"""What a run returns: tensors by site (`Trace`), statistics (`Statistics`), a run to restart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import HeadError, InputError
from attnlens.hooks.restart import Recording
from attnlens.hooks.tokens import Sides, Tokens
from attnlens.lens.asked import check_prompts
from attnlens.lens.inputs import Batch


class SiteTensors(Mapping[str, Tensor]):
    """One tensor a site, by name (`"L3"`, `"cross.L3"`) or by layer number in the unnamed stack."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, site: str | int) -> Tensor:
        name = f"L{site}" if isinstance(site, int) else site
        if name not in self._tensors:
            raise HeadError(f"Nothing was kept at {name!r}; there is {', '.join(self._tensors)}.")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def stack(self, stack: str = "") -> Tensor:
        """All layers of one stack as `batch layer ...`, in order."""
        chosen = [
            t
            for name, t in self._tensors.items()
            if name.rpartition(".L")[0] == stack or (not stack and "." not in name)
        ]
        if not chosen:
            raise HeadError(f"Nothing was kept of stack {stack!r}; there is {', '.join(self)}.")
        shapes = {tuple(tensor.shape) for tensor in chosen}
        if len(shapes) > 1:
            raise InputError(
                f"The layers of stack {stack!r} have shapes {sorted(shapes)}; only equal shapes "
                f"stack. There is {', '.join(self._tensors)}."
            )
        return torch.stack(chosen, dim=1)

    def __repr__(self) -> str:
        shapes = {tuple(tensor.shape) for tensor in self._tensors.values()}
        return f"SiteTensors({', '.join(self._tensors)}; shapes {sorted(shapes)})"


@dataclass(frozen=True)
class Trace:
    """What one run kept. `trace.pattern[layer]` is `batch head query key`; so are `scores`.

    `z` is `batch head query d_v`, `result` `batch head query d_model`, `q` `batch head query d_qk`,
    `k` and `v` `batch group key d`, `residual` (the stream entering a layer's block, and `"final"`)
    and `mlp` (what its MLP adds to the stream) `batch query d_model`. Positions are those of the
    model's input: texts are padded on the right, and `sides` says which positions are real.
    """

    anatomy: Anatomy
    tokens: tuple[tuple[str, ...], ...]
    """Token texts of each prompt, without padding."""
    ids: Tensor | None
    """Token ids, `batch position`, with padding."""
    lengths: tuple[int, ...]
    heads: Mapping[str, tuple[int, ...]]
    """Heads kept at each site, in the order of the head axis."""
    rows: tuple[tuple[int, ...], ...] | None
    """Query rows kept of each prompt; None for all."""
    output: Any
    """What the model returned."""
    kept: Mapping[str, SiteTensors]
    sides: Sides
    """Token ids and real positions of the text, and of the decoder where there is one."""

    def __getitem__(self, kind: str) -> SiteTensors:
        """Tensors of one kind, by site."""
        if kind not in self.kept:
            raise InputError(
                f"{kind!r} was not kept in this run; it kept {', '.join(self.kept)}. "
                f"Run again with keep=({kind!r}, ...)."
            )
        return self.kept[kind]

    @property
    def pattern(self) -> SiteTensors:
        """Attention weights, `batch head query key`."""
        return self["pattern"]

    @property
    def scores(self) -> SiteTensors:
        """Attention scores before the softmax, `batch head query key`; hidden keys are -inf."""
        return self["scores"]

    @property
    def z(self) -> SiteTensors:
        """Head outputs before the output projection, `batch head query d_v`."""
        return self["z"]

    @property
    def result(self) -> SiteTensors:
        """Head outputs after the output projection, no bias, `batch head query d_model`."""
        return self["result"]

    @property
    def q(self) -> SiteTensors:
        """Queries as attention receives them (after rotary embedding), `batch head query d_qk`."""
        return self["q"]

    @property
    def k(self) -> SiteTensors:
        """Keys as attention receives them, `batch group key d_qk`."""
        return self["k"]

    @property
    def v(self) -> SiteTensors:
        """Values, `batch group key d_v`."""
        return self["v"]

    @property
    def residual(self) -> SiteTensors:
        """Residual stream entering each layer's block, and `"final"`, `batch query d_model`."""
        return self["residual"]

    @property
    def mlp(self) -> SiteTensors:
        """What each layer's MLP adds to the residual stream, `batch query d_model`."""
        return self["mlp"]

    def to_frame(self, kind: str = "pattern", prompt: int = 0) -> pd.DataFrame:
        """A table of one prompt's weights or scores: site, head, query, key, tokens, value.

        Queries and keys are numbered over real tokens; padding is left out. There are columns of
        tokens where all rows and keys are of the text.

        Raises:
            InputError: another kind, no such prompt, or sites that attend in pieces of prompts.

        """
        if kind not in ("pattern", "scores"):
            raise InputError(f"Only 'pattern' and 'scores' are tables of tokens, not {kind!r}.")
        count = len(self.lengths)
        if not -count <= prompt < count:
            raise InputError(f"There is no prompt {prompt}; the run has {count}, from 0.")
        check_prompts({kind: self[kind]}, count)
        frames: list[pd.DataFrame] = []
        for name, tensor in self[kind].items():
            site = self.anatomy[name]
            places, queries = self._rows(site, prompt, tensor.shape[2])
            keys = _real_places(self.sides.keys(site).cut(tensor.shape[3]), prompt, tensor.shape[3])
            own = tensor[prompt][:, places][:, :, keys].float().cpu()
            index = pd.MultiIndex.from_product(
                [[name], self.heads[name], queries, range(len(keys))],
                names=["site", "head", "query", "key"],
            )
            frame = pd.DataFrame({kind: own.flatten().numpy()}, index=index).reset_index()
            frames.append(frame)
        table = pd.concat(frames, ignore_index=True)
        if self.tokens and not any("." in site for site in self[kind]):
            words = self.tokens[prompt]
            table.insert(3, "query_token", [words[i] for i in table["query"]])
            table.insert(5, "key_token", [words[i] for i in table["key"]])
        return table

    def _rows(self, site: Site, prompt: int, kept: int) -> tuple[list[int], list[int]]:
        """A prompt's rows among those kept at a site, and their numbers among its real tokens."""
        tokens = self.sides.queries(site)
        if self.rows is None:
            places = _real_places(tokens.cut(kept), prompt, kept)
            return places, list(range(len(places)))
        wanted = self.rows[prompt]
        real = _real_places(tokens, prompt, max(wanted) + 1)
        return list(range(kept)), [real.index(place) for place in wanted]


def _real_places(tokens: Tokens, prompt: int, size: int) -> list[int]:
    """Which positions of a prompt are real; all of `size` where nothing is padded."""
    if tokens.real is None:
        return list(range(size))
    return tokens.real[prompt].nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Statistics:
    """Streamed statistics: `statistics["entropy"]["L3"]` is `prompt head`, others are larger."""

    anatomy: Anatomy
    tokens: tuple[tuple[str, ...], ...]
    lengths: tuple[int, ...]
    values: Mapping[str, SiteTensors]
    columns: Mapping[str, tuple[str, ...]]
    """Names of the numbers a head of each statistic; empty for those that are no table."""

    def __getitem__(self, reducer: str) -> SiteTensors:
        """One statistic, by site."""
        if reducer not in self.values:
            raise InputError(f"{reducer!r} was not measured; there is {', '.join(self.values)}.")
        return self.values[reducer]

    def to_frame(self) -> pd.DataFrame:
        """One row a head: means over prompts of the statistics that are a few numbers a head."""
        rows: list[dict[str, Any]] = []
        for site in self.anatomy.sites:
            measured = {name: t[site.name] for name, t in self.values.items() if site.name in t}
            for head in range(site.heads if measured else 0):
                row: dict[str, Any] = {"head": str(site.head(head)), "site": site.name}
                row |= {"layer": site.layer, "index": head}
                for name, tensor in measured.items():
                    means = tensor[:, head].double().nanmean(0).flatten().tolist()
                    row |= dict(zip(self.columns[name], means, strict=False))
                rows.append(row)
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Recorded:
    """One run with what each block and attention module returned; `lens.restart` goes on from it.

    Made by `lens.record`.
    """

    batch: Batch
    recording: Recording
    output: Any
    """What the model returned."""

    def __repr__(self) -> str:
        size = self.recording.bytes / 1e6
        return f"Recorded({self.recording.model}, {self.batch.size} prompts, {size:.3g} MB)"
