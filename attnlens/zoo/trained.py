"""The trained small language model that ships with the package: where its folder lies."""

from __future__ import annotations

from pathlib import Path

from attnlens.errors import WeightsError

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def small_path() -> Path:
    """Folder of the small trained Llama: load it as any transformers model, offline.

    Raises:
        WeightsError: a file of it is missing from this installation.

    """
    folder = Path(__file__).parent / "small"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"the shipped model lacks {', '.join(missing)} in {folder}; install attnlens again, or "
            "train the model with scripts/train_small.py and put its files there"
        )
    return folder
