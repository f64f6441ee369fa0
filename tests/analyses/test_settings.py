"""Settings of the bootstrap are checked before a text is read, not after an hour of runs."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import attnlens as al
from attnlens.analyses.attention_probe import ProbeSettings
from attnlens.analyses.syntax import SyntaxSettings
from attnlens.errors import InputError
from attnlens.lens import Lens

OVER_TEXTS = (
    al.head_similarity,
    al.layer_similarity,
    al.head_ranks,
    al.rhythm,
    al.long_context_heads,
    al.attention_basin,
    al.massive_activations,
    al.massive_qk,
    al.visual_sinks,
    al.vision_aware_heads,
)


@pytest.mark.parametrize("method", OVER_TEXTS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("bad", [{"resamples": 0}, {"confidence": 95}])
def test_before_a_text_is_read(
    random_lens: Lens, method: Callable[..., Any], bad: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="Cannot bootstrap with"):
        method(random_lens, [], **bad)


@pytest.mark.parametrize("settings", [SyntaxSettings, ProbeSettings])
def test_settings_of_sentences(settings: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="Cannot bootstrap with 0 resamples"):
        settings(resamples=0)


def test_alignment(random_lens: Lens) -> None:
    with pytest.raises(InputError, match="Cannot bootstrap with 0 resamples"):
        al.property_alignment(random_lens, [], [], resamples=0)


@pytest.mark.parametrize(
    "method",
    [al.head_similarity, al.head_ranks, al.rhythm, al.massive_activations, al.massive_qk],
    ids=lambda method: method.__name__,
)
def test_a_layer_may_be_named_by_its_number(
    random_lens: Lens, ids: Tensor, method: Callable[..., Any]
) -> None:
    found = method(random_lens, ids, layers=1, resamples=2)
    named = method(random_lens, ids, layers="L1", resamples=2)
    assert found.to_frame().equals(named.to_frame())
