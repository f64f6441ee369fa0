"""Where things are in a model: attention sites, their heads, and views of their weights.

A site is one place where attention is computed: a module and which of its calls in a forward pass
(some models call one module for all layers). Sites print as `L3`; models with several stacks prefix
the stack: `enc.L3`, `dec.L3`, `cross.L3`, `vision.L3`. Heads print as `L3H5`, `cross.L3H5`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from attnlens.errors import HeadError

Kind = Literal["self", "encoder", "cross"]


@dataclass(frozen=True)
class Site:
    """One attention site, as seen in a probe run."""

    module: str
    """Qualified name of the attention module."""
    call: int
    """Which of the module's calls in one forward pass (0 unless layers share the module)."""
    stack: str
    """"" for the only or the text stack, else `enc`, `dec`, `cross`, `vision`, ..."""
    layer: int
    kind: Kind
    """`self` (decoder), `encoder` (bidirectional), or `cross` (keys from elsewhere)."""
    heads: int
    groups: int
    d_qk: int
    d_v: int
    causal: bool
    window: int | None
    sinks: bool
    """Whether learned sink logits take a share of each row."""
    upcast: bool
    """Whether the model takes the softmax in float32 whatever its own dtype."""
    block: str | None
    """Qualified name of the transformer block that holds the site."""
    output: str | None
    """Qualified name of the output projection; None where a gate or a norm stands between."""

    @property
    def name(self) -> str:
        """`L3` or `cross.L3`."""
        return f"{self.stack}.L{self.layer}" if self.stack else f"L{self.layer}"

    def head(self, head: int) -> Head:
        """One head of this site."""
        return Head(self.stack, self.layer, head)


@dataclass(frozen=True, order=True)
class Head:
    """One head, by stack, layer and number; prints as `L3H5` or `cross.L3H5`."""

    stack: str
    layer: int
    head: int

    @property
    def site(self) -> str:
        """The name of the head's site."""
        return f"{self.stack}.L{self.layer}" if self.stack else f"L{self.layer}"

    def __str__(self) -> str:
        return f"{self.site}H{self.head}"


def read_head(text: str) -> Head:
    """The head that prints as `text`, of whatever model.

    Raises:
        HeadError: the text is no single head.

    """
    found = _PART.match(text)
    if found is None or found["head"] is None or found["open"]:
        raise HeadError(f"{text!r} is no head: heads are written L3H5 or cross.L3H5.")
    return Head(found["stack"] or "", int(found["from"]), int(found["head"]))


HeadSpec = str | Head | tuple[int, int] | Iterable["str | Head | tuple[int, int]"]

_PART = re.compile(
    r"^(?:(?P<stack>[A-Za-z_]\w*)\.)?"
    r"L(?P<from>\d+)(?P<open>:(?P<to>\d+)?)?(?:H(?P<head>\d+))?$"
)


@dataclass(frozen=True)
class Anatomy:
    """The attention sites of a model in the order in which they run, and what surrounds them."""

    model: str
    """Class name of the model."""
    sites: tuple[Site, ...]
    d_model: int | None
    vocab: int | None
    context: int | None
    """Longest input in positions, None where the model sets no limit."""
    final_norm: str | None
    unembedding: str | None
    parameters: int
    unseen: tuple[str, ...] = ()
    """Attention modules that ran outside transformers' attention interface and cannot be seen."""

    def __getitem__(self, name: str | int) -> Site:
        """The site of a name (`"L3"`, `"cross.L3"`) or of a layer number in the unnamed stack."""
        wanted = f"L{name}" if isinstance(name, int) else name
        for site in self.sites:
            if site.name == wanted:
                return site
        raise HeadError(f"There is no site {wanted!r}. {self._what_exists()}")

    @property
    def heads(self) -> tuple[Head, ...]:
        """Every head of every site."""
        return tuple(site.head(h) for site in self.sites for h in range(site.heads))

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks in the order in which they run."""
        return tuple(dict.fromkeys(site.stack for site in self.sites))

    def find(self, spec: HeadSpec) -> tuple[Head, ...]:
        """The heads that a specification names, in order, each once.

        `"all"`, `"L3H5"`, `"L3"` (a layer), `"L3:"` and `"L3:5"` (layers, end excluded), several
        separated by commas, `"cross.L3H5"` in other stacks, `(layer, head)` pairs, or a list of
        these.
        """
        return tuple(dict.fromkeys(self._find(spec)))

    def layers(self, spec: HeadSpec | int | None) -> tuple[Site, ...]:
        """The sites that a specification names (all for None): `"L3"`, `"L3:"`, `3`, `[0, 3]`."""
        if spec is None:
            return self.sites
        if isinstance(spec, int):
            return (self[spec],)
        if not isinstance(spec, (str, Head)) and all(isinstance(part, int) for part in spec):
            return tuple(self[part] for part in spec)  # type: ignore[index]
        names = {head.site for head in self.find(spec)}
        return tuple(site for site in self.sites if site.name in names)

    def _find(self, spec: HeadSpec) -> list[Head]:
        if isinstance(spec, Head):
            return [self._checked(spec, spec)]
        if isinstance(spec, str):
            return [head for part in spec.split(",") for head in self._parse(part.strip(), spec)]
        parts = list(spec)
        if len(parts) == 2 and all(isinstance(part, int) for part in parts):
            layer, head = parts
            return [self._checked(Head("", layer, head), spec)]  # type: ignore[arg-type]
        return [head for part in parts for head in self._find(part)]  # type: ignore[arg-type]

    def _parse(self, part: str, spec: object) -> list[Head]:
        if part == "all":
            return list(self.heads)
        found = _PART.match(part)
        if found is None:
            raise HeadError(
                f"Cannot read {part!r} in the head specification {spec!r}. "
                'Write "L3H5", "L3", "L3:", "L3:5", "cross.L3H5", several with commas, or "all". '
                + self._what_exists()
            )
        stack, first = found["stack"] or "", int(found["from"])
        if found["open"]:
            last = int(found["to"]) if found["to"] else None
            chosen = [
                site
                for site in self.sites
                if site.stack == stack
                and first <= site.layer
                and (last is None or site.layer < last)
            ]
        else:
            chosen = [s for s in self.sites if s.stack == stack and s.layer == first]
        if not chosen:
            raise HeadError(f"{spec!r} names no layer of this model. {self._what_exists()}")
        if found["head"] is None:
            return [site.head(h) for site in chosen for h in range(site.heads)]
        return [self._checked(site.head(int(found["head"])), spec) for site in chosen]

    def _checked(self, head: Head, spec: object) -> Head:
        for site in self.sites:
            if (site.stack, site.layer) == (head.stack, head.layer):
                if 0 <= head.head < site.heads:
                    return head
                raise HeadError(
                    f"{spec!r} names head {head.head} of {site.name}, which has heads 0 to "
                    f"{site.heads - 1}. {self._what_exists()}"
                )
        raise HeadError(f"{spec!r} names no layer of this model. {self._what_exists()}")

    def _what_exists(self) -> str:
        parts: list[str] = []
        for stack in self.stacks:
            sites = [site for site in self.sites if site.stack == stack]
            prefix = f"{stack}." if stack else ""
            heads = sorted({site.heads for site in sites})
            count = str(heads[0]) if len(heads) == 1 else f"{heads[0]} to {heads[-1]}"
            layers = _ranges([site.layer for site in sites])
            parts.append(f"{prefix}L{layers} with {count} heads")
        return f"{self.model} has " + ", ".join(parts) + "."

    def __str__(self) -> str:
        head = (
            f"{self.model}: {len(self.sites)} attention sites, "
            f"{len(self.heads)} heads, {self.parameters:,} parameters"
        )
        extras = [
            f"width {self.d_model}" if self.d_model else "",
            f"vocabulary {self.vocab}" if self.vocab else "",
            f"context {self.context}" if self.context else "",
            f"final norm {self.final_norm}" if self.final_norm else "",
            f"unembedding {self.unembedding}" if self.unembedding else "",
        ]
        rows = [_COLUMNS, *(_row(site) for site in self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if self.unseen:
            names = ", ".join(self.unseen[:3]) + (", ..." if len(self.unseen) > 3 else "")
            lines.append(f"not seen, outside the attention interface: {names}")
        return "\n".join([head, ", ".join(filter(None, extras)), *lines])


_COLUMNS = ("site", "kind", "heads", "groups", "d_qk", "d_v", "mask", "sinks", "module", "output")


def _row(site: Site) -> tuple[str, ...]:
    mask = "causal" if site.causal else "full"
    if site.window is not None:
        mask += f", window {site.window}"
    module = site.module if site.call == 0 else f"{site.module} (call {site.call})"
    output = site.output or "-"
    if site.output and site.block and site.output.startswith(site.block + "."):
        output = site.output[len(site.block) + 1 :]
    return (
        site.name,
        site.kind,
        str(site.heads),
        str(site.groups),
        str(site.d_qk),
        str(site.d_v),
        mask,
        "learned" if site.sinks else "-",
        module,
        output,
    )


def _ranges(numbers: Sequence[int]) -> str:
    """`0..5` for a run of numbers, else the numbers."""
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        return f"{numbers[0]}..{numbers[-1]}"
    return ",".join(str(number) for number in numbers)
