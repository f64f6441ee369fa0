"""Runs the tests of the GPU kernels on the CPU, through Triton's interpreter.

Triton decides when it is imported whether it compiles or interprets, and transformers imports it in
passing; and while the interpreter is on, fused blocks would take the place of torch's. Hence a
process of its own: no other test can notice.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("path", ["tests/kernels/test_triton_rows.py", "tests/hooks/test_fused.py"])
def test_in_a_process_of_its_own(path: str, repository: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, path],
        cwd=repository,
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout
