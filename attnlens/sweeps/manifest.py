"""What a sweep is: the model, the task, the trials and all that its values depend on.

It is written beside the values, so that nobody adds those of another sweep to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnlens import __version__
from attnlens.errors import FileError, InputError

CLEAN = "clean"
"""Name of the run in which nothing is edited; its trial number is -1."""

FORMAT = 1
_DESCRIBED = 1_000_000  # characters of all descriptions together; beyond it they become digests
_SHOWN = 100  # characters of a value in a message


@dataclass(frozen=True)
class Manifest:
    """What the values of a sweep depend on; made by `Manifest.of`.

    Attributes:
        model, task: what was run and graded, as `fingerprint.model_facts` and `task_facts` tell.
        prompts: number of prompts of the task.
        trials: name and description of each trial, in the order of their numbers.
        seed: of everything that is drawn.
        settings: everything else that changes a value.
        versions: of the packages with which the sweep began. They may differ.

    """

    model: Mapping[str, Any]
    task: Mapping[str, Any]
    prompts: int
    trials: tuple[tuple[str, Any], ...]
    seed: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @classmethod
    def of(
        cls,
        *,
        model: Mapping[str, Any],
        task: Mapping[str, Any],
        prompts: int,
        trials: Iterable[tuple[str, Any]],
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Manifest:
        """A manifest of what was given, as JSON would give it back.

        Descriptions of more than a million characters together are kept as digests.

        Raises:
            InputError: no prompts, two trials of one name, one called "clean", or values that JSON
                cannot hold.

        """
        listed = [(str(name), _plain(f"trial {name}", edits)) for name, edits in trials]
        _check_names([name for name, _ in listed])
        if prompts < 1:
            raise InputError(f"A sweep over {prompts} prompts: give one at least.")
        if sum(len(json.dumps(edits)) for _, edits in listed) > _DESCRIBED:
            listed = [(name, _digest(edits)) for name, edits in listed]
        return cls(
            model=_plain("model", dict(model)),
            task=_plain("task", dict(task)),
            prompts=int(prompts),
            trials=tuple(listed),
            seed=int(seed),
            settings=_plain("settings", dict(settings or {})),
            versions=dict(versions if versions is not None else versions_here()),
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the trials, by number."""
        return tuple(name for name, _ in self.trials)

    @cached_property
    def identity(self) -> str:
        """Digest of all but the versions and the model's config, whose keys depend on a version."""
        facts = self._facts() | {"model": {**self.model, "config": None}}
        return _digest(facts)

    def check_same(self, folder: Path, saved: Manifest) -> None:
        """Refuse to add to the sweep in `folder` what belongs to another one.

        Raises:
            FileError: anything but the versions differs; it names what, and both values.

        """
        found = _difference("", saved._facts(), self._facts())
        if found is not None:
            name, there, here = found
            raise FileError(
                f"{folder} holds another sweep: {name} is {_short(there)} there and {_short(here)} "
                "here. Give the same as before, or choose another folder."
            )

    def to_json(self) -> str:
        """The manifest as text, one trial a line."""
        facts = self._facts()
        trials = facts.pop("trials")
        head = json.dumps({"format": FORMAT} | facts | {"versions": dict(self.versions)}, indent=2)
        lines = ",\n    ".join(json.dumps(trial) for trial in trials)
        return f'{head[:-2]},\n  "trials": [\n    {lines}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Manifest:
        """The manifest that was written.

        Raises:
            FileError: it is damaged, none of these, or of a later attnlens.

        """
        try:
            facts = json.loads(text)
            if facts["format"] > FORMAT:
                raise FileError(
                    f"{path} was written by a later attnlens ({_short(facts['versions'])}): update "
                    "attnlens to read it."
                )
            return cls.of(
                model=facts["model"],
                task=facts["task"],
                prompts=facts["prompts"],
                trials=[(trial["name"], trial["edits"]) for trial in facts["trials"]],
                seed=facts["seed"],
                settings=facts["settings"],
                versions=facts["versions"],
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise FileError(
                f"{path} is damaged, or is no manifest of a sweep. Restore it from a copy, or "
                "choose another folder."
            ) from error

    def _facts(self) -> dict[str, Any]:
        """All that has to agree; what a person chose before the digests that follow from it."""
        return {
            "prompts": self.prompts,
            "seed": self.seed,
            "model": dict(self.model),
            "task": dict(self.task),
            "settings": dict(self.settings),
            "trials": [{"name": name, "edits": edits} for name, edits in self.trials],
        }


def versions_here() -> dict[str, str]:
    """Versions of attnlens, torch and transformers as installed here, none of them imported."""
    found = {"attnlens": __version__}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a reader needs neither
            continue
    return found


def _check_names(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen or name == CLEAN:
            taken = "is the name of the unedited run" if name == CLEAN else "names two trials"
            raise InputError(f"{name!r} {taken}: give each trial a name of its own.")
        seen.add(name)


def _plain(what: str, value: Any) -> Any:
    """The value as JSON gives it back."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"The description of {what} cannot be written as JSON ({error}): give numbers, texts, "
            "lists and dictionaries."
        ) from error


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any] | None:
    """The first place in which two plain values differ, and what stands there."""
    if isinstance(there, dict) and isinstance(here, dict):
        return _in_dicts(name, there, here)
    if isinstance(there, list) and isinstance(here, list):
        if len(there) != len(here):
            return f"the number of {name}", len(there), len(here)
        for number, (one, other) in enumerate(zip(there, here, strict=True)):
            found = _difference(f"{name}[{number}]", one, other)
            if found is not None:
                return found
        return None
    return None if there == here else (name, there, here)


def _in_dicts(
    name: str, there: dict[str, Any], here: dict[str, Any]
) -> tuple[str, Any, Any] | None:
    for key in there | here:
        if name == "model.config" and not (key in there and key in here):
            continue  # transformers adds and drops keys from version to version
        inner = f"{name}.{key}" if name else key
        found = _difference(inner, there.get(key, "absent"), here.get(key, "absent"))
        if found is not None:
            return found
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
