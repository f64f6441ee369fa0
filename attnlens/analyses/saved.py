"""A long measurement on disk: what it has counted so far, of which texts, by which model."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attnlens.anatomy.placed import weight_names, weight_of
from attnlens.errors import FileError, InputError
from attnlens.files import write_atomically
from attnlens.lens import Lens

MARKS = 4096
"""Hashes kept on the way: to within how many texts it is known where other texts begin."""

_FORMAT = "attnlens measurement 1"
_PROBE = "The 2 cats' naïve owner said: “Yes – 10,000 times!”\n\t東京 x_1 = {};"


class Consumed:
    """A running hash of the texts that were counted, with marks on the way.

    `chain_n = sha256(chain_{n-1} + text_n)`. Every `stride`-th hash is marked; where marks become
    too many every second one goes, so the size is bounded however many texts there are.
    """

    def __init__(self) -> None:
        self.count = 0
        self.stride = 1
        self._chain = bytes(32)
        self._marks: list[bytes] = []

    def add(self, text: str) -> None:
        """Count one more text."""
        self._chain = _next(self._chain, text)
        self.count += 1
        if self.count % self.stride == 0:
            self._marks.append(self._chain[:8])
        if len(self._marks) == MARKS:
            self._marks = self._marks[1::2]
            self.stride *= 2

    def skip(self, texts: Iterator[str], path: Path) -> None:
        """Go past the texts that were counted, which have to be the same.

        Raises:
            InputError: another text, or too few; it names the text, or where it is to be found.

        """
        chain, same = bytes(32), 0
        for number in range(self.count):
            text = next(texts, None)
            if text is None:
                raise InputError(
                    f"{path} has counted {self.count} texts and only {number} are given now. Give "
                    "the same texts in the same order, or another state file."
                )
            chain = _next(chain, text)
            passed = number + 1
            marked = passed % self.stride == 0
            wrong = marked and chain[:8] != self._marks[passed // self.stride - 1]
            if wrong or (passed == self.count and chain != self._chain):
                which = f"Text {number}" if same == number else f"One of texts {same} to {number}"
                raise InputError(
                    f"{which} is not the one that {path} has counted. Give the same texts in the "
                    "same order, or another state file."
                )
            same = passed if marked else same

    def facts(self) -> dict[str, Any]:
        """What to save."""
        marks = b"".join(self._marks).hex()
        return {"count": self.count, "stride": self.stride, "chain": self._chain.hex()} | {
            "marks": marks
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        self.count, self.stride = facts["count"], facts["stride"]
        self._chain, marks = bytes.fromhex(facts["chain"]), bytes.fromhex(facts["marks"])
        self._marks = [marks[place : place + 8] for place in range(0, len(marks), 8)]


def _next(chain: bytes, text: str) -> bytes:
    return hashlib.sha256(chain + text.encode("utf-8", "surrogatepass")).digest()


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts, whole or not at all.

    Raises FileError where the place cannot be written.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "facts": json.dumps(facts), "sum": _sum(whole)}
    write_atomically(path, save(whole, metadata))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts as they were written.

    Raises:
        FileError: the file is damaged, or is none of these.

    """
    if path.is_dir():
        raise FileError(f"{path} is a folder: give the name of a file in it.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != _FORMAT or metadata["sum"] != _sum(tensors):
            raise ValueError
        return tensors, json.loads(metadata["facts"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise FileError(
            f"{path} is damaged, or is no state of a measurement. To start anew delete it, or give "
            "another path."
        ) from error


def _sum(tensors: Mapping[str, Tensor]) -> str:
    """Check sum of the values of tensors."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].numpy().tobytes(), found)
    return f"{found:08x}"


def check_same(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError where a setting differs from the one saved, naming it."""
    now = json.loads(json.dumps(now))
    for name in now:
        if saved.get(name) != now[name]:
            raise InputError(
                f"{path} was saved with another {name}: {saved.get(name)} there, {now[name]} here. "
                "Give the same as before, or another state file."
            )


def fingerprint(lens: Lens) -> dict[str, str]:
    """Model and tokenizer in short: names, shapes and a sample of every weight; a text's ids."""
    digest = hashlib.sha256()
    for name in weight_names(lens.model):
        weight = weight_of(lens.model, name)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)][:65]
        digest.update(sample.to(torch.float64).cpu().numpy().tobytes())
    ids = lens.tokenizer(_PROBE)["input_ids"] if lens.tokenizer is not None else []
    words = hashlib.sha256(json.dumps([ids, sorted(lens.special_ids)]).encode())
    return {
        "model": f"{lens.anatomy.model} {digest.hexdigest()[:12]}",
        "tokenizer": f"{type(lens.tokenizer).__name__} {words.hexdigest()[:12]}",
    }
