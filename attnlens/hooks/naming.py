"""Give sites their stack and layer: `L3`, `enc.L3`, `dec.L3`, `cross.L3`, `vision.L3`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from attnlens.anatomy import Site

_WORDS = {
    "vision": ("vision", "visual", "image", "pixel"),
    "audio": ("audio", "speech", "sound"),
    "text": ("text", "language"),
}


def name_sites(sites: Sequence[Site], encoder_decoder: bool) -> list[Site]:
    """The sites with stacks and layers.

    Sites whose module names differ in numbers only form a stack. The stack of an encoder-decoder
    model is named by its role; elsewhere the only stack, or the text stack, has no name.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for index, site in enumerate(sites):
        shape = re.sub(r"\.\d+(?=\.|$)", ".#", site.module)
        groups.setdefault((shape, site.kind if site.kind == "cross" else ""), []).append(index)
    labels = _labels(list(groups), sites, groups, encoder_decoder)
    named = list(sites)
    for key, members in groups.items():
        for layer, index in zip(_layers([sites[i] for i in members]), members, strict=True):
            named[index] = replace(sites[index], stack=labels[key], layer=layer)
    return named


def _labels(
    keys: Sequence[tuple[str, str]],
    sites: Sequence[Site],
    groups: dict[tuple[str, str], list[int]],
    encoder_decoder: bool,
) -> dict[tuple[str, str], str]:
    kinds = {key: sites[groups[key][0]].kind for key in keys}
    labels = {key: _label(key[0], kinds[key], encoder_decoder) for key in keys}
    if not encoder_decoder:
        main = [key for key in keys if labels[key] == "text"] or [
            key for key in keys if kinds[key] == "self" and not labels[key]
        ]
        if len(keys) == 1:
            main = list(keys)
        if len(main) == 1:
            labels[main[0]] = ""
    taken: dict[str, int] = {}
    for key in keys:
        label = labels[key]
        taken[label] = taken.get(label, 0) + 1
        if taken[label] > 1:
            labels[key] = f"{label or 'stack'}{taken[label]}"
    return labels


def _label(shape: str, kind: str, encoder_decoder: bool) -> str:
    for label, words in _WORDS.items():
        if any(word in shape.lower() for word in words):
            return label if kind != "cross" else "cross"
    if kind == "cross":
        return "cross"
    if encoder_decoder:
        return "dec" if kind == "self" else "enc"
    return ""


def _layers(sites: Sequence[Site]) -> list[int]:
    """The number in the module names where it tells the sites apart, else the order of calls."""
    numbers = [re.findall(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", site.module) for site in sites]
    varying = [
        column
        for column in (zip(*numbers, strict=True) if len({len(n) for n in numbers}) == 1 else [])
        if len(set(column)) > 1
    ]
    if len(varying) == 1 and len(set(varying[0])) == len(sites):
        return [int(number) for number in varying[0]]
    if len(sites) == 1 and len(numbers[0]) == 1:
        return [int(numbers[0][0])]
    return list(range(len(sites)))
