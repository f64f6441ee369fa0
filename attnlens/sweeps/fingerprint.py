"""By what a model and a task are known again: digests of all that their numbers depend on."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from attnlens.anatomy.placed import weight_names, weight_of
from attnlens.lens import Lens
from attnlens.tasks import Task

_CHUNK = 1 << 26  # bytes hashed at a time, so that a weight on a GPU is never copied whole
# Of a config: where the model came from and how it is run, not what it is.
_PASSING = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "id2label", "label2id", "dtype"}
    | {"torch_dtype", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
)


def model_facts(lens: Lens) -> dict[str, Any]:
    """The model's name, a digest of every number in it, and its config.

    The digest covers names, shapes, types and all values of parameters and buffers, and is the same
    on every device, and for weights that accelerate has put away.
    """
    model = lens.model
    weights = weight_names(model)
    buffers = dict(model.named_buffers())

    def digest(name: str) -> bytes:
        return _tensor_digest(name, buffers[name] if name in buffers else weight_of(model, name))

    # hashlib and copies from a device let other threads run.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(digest, [*weights, *buffers])
        whole = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    return {
        "name": lens.anatomy.model,
        "weights": f"sha256 {whole}",
        "config": _config(getattr(model, "config", None)),
    }


def task_facts(task: Task, metric: str | None = None) -> dict[str, Any]:
    """The task's name, its metric, and a digest of the tensors by which it is graded."""
    digest = hashlib.sha256()
    for name in ("clean", "corrupt", "mask", "reads", "answers", "wrong"):
        tensor: Tensor = getattr(task, name)
        digest.update(_tensor_digest(name, tensor.long()))
    return {
        "name": task.name,
        "metric": metric or task.metric,
        "tensors": f"sha256 {digest.hexdigest()[:16]}",
    }


def _tensor_digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.device.type != "meta":
        flat = tensor.detach().reshape(-1).view(torch.uint8)  # a view: bytes as they lie in memory
        for chunk in flat.split(_CHUNK):
            content: Any = chunk.cpu().numpy()
            digest.update(content)
    return digest.digest()


def _config(config: Any) -> dict[str, Any]:
    """What a transformers config says of the model; nothing where it is of another kind."""
    if not hasattr(config, "to_json_string"):
        return {}
    return _lasting(json.loads(config.to_json_string(use_diff=False)))


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in facts.items()
        if key not in _PASSING and "attn_implementation" not in key
    }
