"""A model whose weights are drawn anew is another model, and every attribution of it another.

An attribution that stays is one of the input, or of the architecture, not of what was learned
(Adebayo et al. 2018, Sanity checks for saliency maps).
"""

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import attnlens as al
from attnlens.analyses.attribute import METHODS, attribute
from attnlens.lens import Lens
from attnlens.tasks import Task, copy_task
from attnlens.zoo import small_path

LEARNED = [name for name in METHODS if name != "random"]  # which does not look at the model
SETTINGS: dict[str, dict[str, object]] = {}
"""What a method cannot do without, by its name."""


@pytest.fixture(scope="module")
def trained() -> Lens:
    return al.load(small_path())


@pytest.fixture(scope="module")
def randomised(trained: Lens) -> Lens:
    """The same architecture as its initialisation leaves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(trained.model.config).eval()
    return al.load(model, tokenizer=trained.tokenizer)


def shares(lens: Lens, task: Task, method: str) -> Tensor:
    """Scores as shares of what a prompt's scores have in all, whatever their sign or unit."""
    settings = SETTINGS.get(method, {})
    target = al.Target(task.answers[:, 0].tolist())
    found = attribute(lens, task.clean, target, method=method, **settings)
    scores = found.scores.double()
    assert scores.isfinite().all()
    return scores / scores.abs().sum(1, keepdim=True)


@pytest.mark.parametrize("method", LEARNED)
def test_other_weights_other_scores(method: str, trained: Lens, randomised: Lens) -> None:
    """A fifth of all that is shared out moves, of 2 that could; rounding moves next to nothing.

    Attention flow moves least (0.3), relevance and leaving out most (over 1).
    """
    task = copy_task(trained, 3, length=14, seed=5)
    before, again, after = (shares(lens, task, method) for lens in (trained, trained, randomised))
    assert (before - again).abs().sum(1).max() < 1e-4
    assert (before - after).abs().sum(1).min() > 0.2
