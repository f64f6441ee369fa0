"""A sweep on its way to other processes, each of which gets a model of its own."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attnlens.anatomy.placed import laid_out
from attnlens.errors import FileError, InputError
from attnlens.lens import Lens
from attnlens.lens.load import load
from attnlens.sweeps.fingerprint import model_facts
from attnlens.sweeps.sweep import Sweep


@dataclass(frozen=True)
class Sent:
    """A sweep as bytes, without a model that comes from a folder; made by `Sent.of`.

    Attributes:
        content: the pickled sweep.
        folder: where the model lies that `content` leaves out; None where it is within.
        options: how the folder is to be loaded.
        kernel: the attention kernel of the model.
        weights: the digest of the model's weights.

    """

    content: bytes
    folder: str | None
    options: Mapping[str, Any]
    kernel: str | None
    weights: str

    @classmethod
    def of(cls, job: Sweep) -> Sent:
        """The sweep, to be opened in other processes, on other machines perhaps.

        Raises:
            InputError: it holds what cannot be pickled, or a model over several devices that is of
                no folder.

        """
        model: Any = job.lens.model
        folder = _folder(model)
        options: dict[str, Any] = {"dtype": next(model.parameters()).dtype}
        if laid_out(model):
            options["device_map"] = "auto"
            if folder is None:
                raise InputError(
                    "A model placed over several devices cannot be sent to workers: load it from a "
                    "folder that every machine has, al.load(FOLDER, device_map='auto')."
                )
        try:
            content = _packed(job, model if folder is not None else None)
        except (TypeError, AttributeError, ValueError, RuntimeError, pickle.PickleError) as error:
            raise InputError(
                f"This sweep cannot be sent to other processes ({error}): make its edits of "
                "functions of a module, and take hooks of your own off the model."
            ) from error
        kernel = getattr(model.config, "_attn_implementation", None)
        return cls(content, folder, options, kernel, model_facts(job.lens)["weights"])

    def open(self, device: str) -> Sweep:
        """The sweep with a model of its own on a device.

        Raises:
            InputError: the folder holds another model than the sweep is of, or a module that the
                sweep is made of is missing here.
            FileError: there is no such folder here.

        """
        try:
            job: Sweep = _unpacked(self.content, self._model)
        except (ImportError, AttributeError, pickle.PickleError) as error:
            raise InputError(
                f"A worker cannot rebuild the sweep ({error}): what its trials are made of has to "
                "be in modules that every machine has, in the same versions."
            ) from error
        if "device_map" not in self.options:
            job.lens.model.to(device)
        _move_example(job.lens)
        found = model_facts(job.lens)["weights"]
        if found != self.weights:
            raise InputError(
                f"The model in {self.folder} is not the one that the sweep is of ({found} there, "
                f"{self.weights} here): it was changed after it was loaded, or the folder was. "
                "Save the model with save_pretrained, and al.load that folder."
            )
        return job

    def _model(self) -> nn.Module:
        assert self.folder is not None
        if not Path(self.folder).is_dir():
            raise FileError(
                f"A worker has no model folder {self.folder}: it has to be there under this path "
                "on every machine of the cluster."
            )
        model: Any = load(self.folder, check=False, **self.options).model
        if self.kernel is not None and model.config._attn_implementation != self.kernel:
            model.set_attn_implementation(self.kernel)
        return model


def _folder(model: nn.Module) -> str | None:
    """The folder from which a model was loaded; None for one made here or from a hub."""
    name = getattr(model, "name_or_path", None)
    if not name or not (Path(name) / "config.json").is_file():
        return None
    return str(Path(name).resolve())


def _packed(job: Sweep, hole: nn.Module | None) -> bytes:
    """The sweep as bytes, tensors on the CPU, with a hole in place of a module."""
    # Ray's own pickler: functions of a notebook travel whole.
    pickler: Any = import_module("ray.cloudpickle").CloudPickler

    class Packer(pickler):
        def persistent_id(self, obj: Any) -> str | None:
            return "model" if hole is not None and obj is hole else None

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, Tensor) and obj.device.type not in ("cpu", "meta"):
                moved = obj.detach().cpu()
                if isinstance(obj, nn.Parameter):
                    return nn.Parameter, (moved, obj.requires_grad)
                return _same, (moved,)
            return super().reducer_override(obj)

    content = io.BytesIO()
    Packer(content).dump(job)
    return content.getvalue()


def _unpacked(content: bytes, model: Callable[[], nn.Module]) -> Any:
    """The sweep; `model` gives what fills the hole, if there is one."""

    class Unpacker(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return model()

    return Unpacker(io.BytesIO(content)).load()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _move_example(lens: Lens) -> None:
    """The input on which the model was examined goes where the model is."""
    example: dict[str, Any] = vars(lens)["_example"]
    for name, value in example.items():
        example[name] = value.to(lens.device) if isinstance(value, Tensor) else value
