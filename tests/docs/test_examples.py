"""The Python in the pages of documentation runs as it is printed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def code(page: str) -> str:
    """All Python blocks of a page, one after the other, as a reader would type them."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/head-profiles.md",
    "docs/edits.md",
    "docs/ablation.md",
    "docs/patching.md",
    "docs/circuits.md",
    "docs/attribution.md",
    "docs/faithfulness.md",
    "docs/tasks.md",
    "docs/composition.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "example.py"
    script.write_text(code(page))
    assert "lens" in runpy.run_path(str(script), run_name="example")
