"""The public face: cheap to import, and every name it offers is there."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import attnlens

TIMED_IMPORT = """
import sys, time
start = time.perf_counter()
import attnlens
seconds = time.perf_counter() - start
print(seconds, *sorted({"torch", "transformers", "pandas", "plotly"} & set(sys.modules)))
"""


def import_once() -> tuple[float, list[str]]:
    """Seconds that the import took in a fresh interpreter, and which heavy libraries it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED_IMPORT], capture_output=True, text=True, check=True
    )
    seconds, *heavy = done.stdout.split()
    return float(seconds), heavy


def test_import_is_lazy_and_fast() -> None:
    runs = [import_once() for _ in range(3)]
    assert all(heavy == [] for _, heavy in runs)
    assert min(seconds for seconds, _ in runs) < 0.3


@pytest.mark.parametrize("name", attnlens.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(attnlens, name) is not None
    assert name in dir(attnlens)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rolout'"):
        _ = attnlens.rolout


def test_type_checkers_see_the_same_names_in_the_same_places() -> None:
    tree = ast.parse(Path(attnlens.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = dict(attnlens._HOMES) | dict.fromkeys(attnlens._ROOMS, "attnlens")
    assert seen == lazy
    assert set(attnlens.__all__) == set(lazy) | {"__version__"}


def test_version_is_that_of_the_project(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert attnlens.__version__ == project["version"]
