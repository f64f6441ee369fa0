"""Open a pretrained model safely: safetensors only, no code from strangers, no silent gaps."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from attnlens.anatomy.placed import laid_out, weight_names, weight_of
from attnlens.errors import FileError, InputError, UnsupportedModelError, WeightsError
from attnlens.hooks.probe import refuse_bridge
from attnlens.lens.lens import Lens


def load(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    example: Mapping[str, Any] | None = None,
    check: bool = True,
    device_map: str | Mapping[str, Any] | None = None,
) -> Lens:
    """Open a model: a local folder, a hub name, or a transformers model that is loaded already.

    `tokenizer` is one of transformers' or a path; it is looked for beside the model where it is not
    given. A model from a folder goes to the GPU where there is one. `example` is an input as the
    model's processor makes it, for models whose input attnlens cannot make up. With `check` the
    self-check runs and an instrument that would not be exact is refused. `device_map` ("auto", or
    a device by module name) lets accelerate lay a folder's model over several devices, memory and
    disk.

    Raises FileError (no such folder), WeightsError (pickle only, damaged, missing or NaN weights),
    UnsupportedModelError (attention outside the seam, code from strangers), SeamError (self-check),
    InputError (no such dtype or device, a model laid over devices that is to move).
    """
    place, precision = _device(device), _dtype(dtype)
    if isinstance(model, nn.Module):
        _refuse_foreign(model)
        _refuse_move(model, place, precision, device_map)
        opened = model
        if precision is not None or place is not None:
            opened = model.to(device=place, dtype=precision)
    else:
        source = _source(model)
        _check_map(device_map, place)
        opened = _open(source, precision, device_map)
        if device_map is None:
            nn.Module.to(opened, place or ("cuda" if torch.cuda.is_available() else "cpu"))
        tokenizer = tokenizer if tokenizer is not None else _tokenizer(source)
    if isinstance(tokenizer, (str, Path)):
        found = _tokenizer(str(tokenizer))
        if found is None:
            raise FileError(f"There is no tokenizer in {str(tokenizer)!r}.")
        tokenizer = found
    refuse_nan(opened)
    lens = Lens(opened, tokenizer, example)
    if check:
        lens.check().raise_problems()
    return lens


def refuse_nan(model: nn.Module) -> None:
    """Raise if a weight is NaN or infinite, naming it."""
    for name in weight_names(model):
        parameter = weight_of(model, name)
        # One pass, no mask as large as the weights: a sum is finite only if every part is.
        if not torch.isfinite(parameter.detach().float().sum()) and not bool(
            torch.isfinite(parameter).all()
        ):
            raise WeightsError(
                f"The weight {name} holds NaN or infinity. The checkpoint is damaged, or was made "
                "by a run that diverged; load another one."
            )


def _refuse_foreign(model: nn.Module) -> None:
    """Models of other libraries have other doors."""
    refuse_bridge(model)
    if not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model: it has no config. Load one with "
            "transformers (AutoModelForCausalLM.from_pretrained) or give al.load its folder."
        )


def _refuse_move(model: nn.Module, place: Any, precision: Any, device_map: Any) -> None:
    """A loaded model stays where it is laid; one over several devices stays as it is."""
    if device_map is not None:
        raise InputError(
            "device_map lays out a model while it is loaded: give al.load a folder or a hub name, "
            "or load with from_pretrained(..., device_map=...) and leave device_map out here."
        )
    if (place is not None or precision is not None) and laid_out(model):
        raise InputError(
            "A model that accelerate has laid over devices can neither be moved nor change its "
            "dtype: leave device and dtype out, or load it anew with them."
        )


def _check_map(device_map: str | Mapping[str, Any] | None, place: torch.device | None) -> None:
    if device_map is None:
        return
    if place is not None:
        raise InputError("Give device or device_map, not both.")
    if find_spec("accelerate") is None:
        raise InputError("device_map needs accelerate: pip install accelerate.")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(
            f"A model cannot have the dtype {dtype!r}. Write 'float32', 'bfloat16' or 'float16'."
        )
    return found


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"The device {str(device)!r} cannot be used here ({_first_line(error)}). Write 'cpu'"
            + (", 'cuda'." if torch.cuda.is_available() else ".")
        ) from error


def _source(model: str | Path) -> str:
    """A folder that can be read, or a hub name."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileError(
                f"{path} has no config.json, so it is no model folder. A model folder holds "
                "config.json and model.safetensors, as save_pretrained writes them."
            )
        _refuse_pickle(path)
        return str(path)
    looks_like_path = isinstance(model, Path) or str(model).startswith((".", "/", "~"))
    if path.exists() or looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        raise FileError(f"There is no model folder {str(model)!r}. Give a folder or a hub name.")
    return str(model)


def _refuse_pickle(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        raise WeightsError(
            f"{folder} holds its weights as pickle only ({', '.join(pickles[:3])}). A pickle can "
            "run any code when it is opened, so attnlens reads safetensors only: convert it where "
            "you trust it, with model.save_pretrained(folder)."
        )
    raise WeightsError(f"{folder} holds no weights: there is no model.safetensors in it.")


def _open(
    source: str, dtype: torch.dtype | None, device_map: str | Mapping[str, Any] | None = None
) -> PreTrainedModel:
    try:
        with _quiet():
            config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
            names: list[str] = getattr(config, "architectures", None) or []
            kind = getattr(transformers, names[0], AutoModel) if names else AutoModel
            model, report = kind.from_pretrained(
                source,
                dtype=dtype or "auto",
                device_map=device_map,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
            )
    except SafetensorError as error:
        raise WeightsError(
            f"The weights of {source} are damaged ({error}). Fetch or save the file again."
        ) from error
    except (OSError, json.JSONDecodeError) as error:
        raise FileError(f"{source} cannot be opened: {_first_line(error)}") from error
    except (ValueError, KeyError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{source} wants to run Python code that comes with it. attnlens does not run code "
                "from a model folder; load the model yourself if you trust it, and give it to "
                "al.load(model)."
            ) from error
        if "does not recognize this architecture" in str(error):
            raise UnsupportedModelError(
                f"{source} cannot be opened: {_first_line(error).split('. ')[0]}."
            ) from error
        raise WeightsError(f"{source} cannot be opened: {_first_line(error)}") from error
    _refuse_gaps(source, report)
    return model.eval()


def _refuse_gaps(source: str, report: Mapping[str, Any]) -> None:
    """Weights that the file lacks are random: their figures would mean nothing."""
    missing = [key for key in sorted(report.get("missing_keys", ())) if "pooler" not in key]
    wrong = [f"{key} of another shape" for key, *_ in sorted(report.get("mismatched_keys", ()))]
    if missing or wrong:
        names = ", ".join((missing + wrong)[:3])
        raise WeightsError(
            f"The weights file of {source} lacks {len(missing) + len(wrong)} of the model's "
            f"weights ({names}, ...); transformers would fill them with random numbers. Use the "
            "whole file, or load the model class that fits it and give it to al.load(model)."
        )


def _tokenizer(source: str) -> Any | None:
    """The tokenizer beside a model, None where there is none."""
    if (
        Path(source).is_dir()
        and not any(Path(source).glob("tokenizer*"))
        and not any(
            (Path(source) / name).is_file() for name in ("vocab.json", "vocab.txt", "spiece.model")
        )
    ):
        return None
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FileError(
            f"The tokenizer of {source} cannot be opened: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


@contextmanager
def _quiet() -> Generator[None]:
    """No progress bars or warnings of transformers while loading; what matters is raised."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
