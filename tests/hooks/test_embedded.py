"""Token embeddings are shown as they are looked up, and others can be put in their place."""

import threading

import pytest
import torch
from torch import Tensor

from attnlens.anatomy import Anatomy
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.embedded import Embedded, token_tables
from attnlens.hooks.probe import examine
from attnlens.hooks.session import Session
from tests.analyses.conftest import tiny_gpt2
from tests.architectures import ARCHITECTURES


def examined(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Anatomy:
    return examine(model, inputs)


def test_each_look_up_is_shown_with_its_ids() -> None:
    model = tiny_gpt2()
    ids = torch.arange(6)[None]
    seen: list[tuple[Tensor, Tensor]] = []
    watch = Embedded(lambda *shown: seen.append(shown))
    plain = model(ids).logits
    with Session(model, examined(model, {"input_ids": ids}), [watch]):
        watched = model(ids).logits
    assert torch.equal(plain, watched)
    ((own, embeddings),) = seen
    assert torch.equal(own, ids)
    assert torch.equal(embeddings, model.transformer.wte.weight[ids])
    assert not model.transformer.wte._forward_hooks
    model(ids)
    assert len(seen) == 1


def test_what_is_returned_goes_on() -> None:
    model = tiny_gpt2()
    ids = torch.arange(6)[None]
    other = torch.randn(1, 6, 32, dtype=torch.float64)
    with Session(model, examined(model, {"input_ids": ids}), [Embedded(lambda *_: other)]):
        found = model(ids).logits
    assert torch.equal(found, model(inputs_embeds=other).logits)


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_an_encoder_looks_up_before_its_decoder(name: str) -> None:
    model = ARCHITECTURES[name].build()
    inputs = {"input_ids": torch.arange(4, 11)[None], "decoder_input_ids": torch.arange(4, 9)[None]}
    seen: list[Tensor] = []
    watch = Embedded(lambda ids, _: seen.append(ids))
    with Session(model, examined(model, inputs), [watch]):
        model(**inputs)
    assert [ids.shape[1] for ids in seen] == [7, 5]


def test_a_scaled_look_up_is_shown_scaled() -> None:
    model = ARCHITECTURES["gemma3_text"].build()
    ids = torch.arange(4, 10)[None]
    seen: list[Tensor] = []
    watch = Embedded(lambda _, embeddings: seen.append(embeddings))
    with Session(model, examined(model, {"input_ids": ids}), [watch]):
        model(ids)
    (table,) = token_tables(model)
    assert torch.equal(seen[0], table(ids))
    assert not torch.allclose(seen[0], table.weight[ids])


def test_tables_are_found_once() -> None:
    for name, count in (("gpt2", 1), ("bert", 1), ("vit", 0)):
        assert len(token_tables(ARCHITECTURES[name].build())) == count, name
    # An encoder and its decoder have modules of their own for one table of weights.
    shared = token_tables(ARCHITECTURES["t5"].build())
    assert len({table.weight.data_ptr() for table in shared}) == 1
    assert len(set(map(id, shared))) == len(shared)


def test_a_model_without_tokens_is_refused() -> None:
    model = ARCHITECTURES["vit"].build()
    inputs = ARCHITECTURES["vit"].inputs(model)
    session = Session(model, examined(model, inputs), [Embedded(lambda *_: None)])
    with pytest.raises(UnsupportedModelError, match="reads no tokens"):
        session.__enter__()
    model(**inputs)


def test_other_threads_are_left_alone() -> None:
    model = tiny_gpt2()
    ids = torch.arange(6)[None]
    seen: list[Tensor] = []
    watch = Embedded(lambda own, _: seen.append(own))
    with Session(model, examined(model, {"input_ids": ids}), [watch]):
        thread = threading.Thread(target=lambda: model(ids))
        thread.start()
        thread.join()
        assert not seen
        model(ids)
    assert len(seen) == 1
