"""What a pass reads is known to edits: ids and padding of either side, pass after pass."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import attnlens as al
from attnlens.errors import InputError
from attnlens.hooks.edits import HeadEdit
from attnlens.hooks.seam import Asked
from attnlens.hooks.where import Running
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.hooks.editing import IDS, lens


def odd(ids: Tensor) -> Tensor:
    return ids % 2 == 1


def moved(subject: Lens, edit: HeadEdit, site: str, inputs: dict[str, Tensor]) -> Tensor:
    """Which rows of a site's z an edit moves, `batch row`; of its own layer alone."""
    plain = subject.run(inputs, keep="z").z[site]
    with subject.edit(edit):
        found = subject.run(inputs, keep="z").z[site]
    return (plain != found).any(3).any(1)


def test_each_side_has_its_own_ids_and_padding() -> None:
    """One function, at the same places, of an encoder's ids and of a decoder's."""
    subject = lens("t5")
    ids, mask = IDS, torch.tensor([[1] * 10 + [0] * 2])
    own, own_mask = IDS * 3 % 41 + 5, torch.tensor([[1] * 8 + [0] * 4])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": own,
        "decoder_attention_mask": own_mask,
    }
    first, second = odd(ids) & mask.bool(), odd(own) & own_mask.bool()
    assert not torch.equal(first, second)
    for site, wanted in (("enc.L1", first), ("dec.L1", second), ("cross.L1", second)):
        assert torch.equal(moved(subject, al.Zero(site, queries=odd), site, inputs), wanted)
    every = [al.Zero(site, queries=odd) for site in ("enc.L1", "dec.L1", "cross.L1")]
    with subject.edit(*every):
        z = subject.run(inputs, keep="z").z
    for site, wanted in (("enc.L1", first), ("dec.L1", second), ("cross.L1", second)):
        assert torch.equal(z[site].eq(0).all(3).all(1), wanted)
    with subject.edit(al.Drop("cross.L0", keys=odd)):
        pattern = subject.run(inputs, keep="pattern").pattern["cross.L0"]
    hidden = pattern[0, :, :8] == 0  # padded rows of the decoder stay as they are
    assert torch.equal(hidden.all(1), (first[0] | ~mask[0].bool()).expand(4, -1))


def test_a_decoder_longer_than_its_encoder_names_the_encoders_keys() -> None:
    subject = lens("t5")
    inputs = {"input_ids": IDS[:, :5], "decoder_input_ids": IDS}
    with subject.edit(al.Drop("cross.L0", keys=0)):
        pattern = subject.run(inputs, keep="pattern").pattern["cross.L0"]
    assert pattern[..., 0].eq(0).all()
    assert pattern[..., 1:].gt(0).all()


def test_an_encoder_that_runs_beside_a_cache_begins_at_its_first_token() -> None:
    subject = lens("t5")
    cache: Any = None
    model: Any = subject.model
    rows: list[Tensor] = []
    module = model.get_submodule(subject.anatomy["enc.L0"].output)
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad(), subject.edit(al.Zero("enc.L0", queries=0)):
        for place in range(2):
            out = model(
                input_ids=IDS,
                decoder_input_ids=IDS[:, place : place + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
    handle.remove()
    for z in rows:
        assert z.eq(0).all(-1)[0].tolist() == [True] + [False] * 11


def test_images_are_no_tokens() -> None:
    subject, name = lens("mllama"), "mllama"
    inputs = ARCHITECTURES[name].inputs(subject.model)  # type: ignore[arg-type]
    (cross,) = [site for site in subject.anatomy.sites if site.kind == "cross"][:1]
    (tower,) = [site for site in subject.anatomy.sites if site.stack.startswith("vision")][:1]
    rows = moved(subject, al.Zero(cross.name, queries=odd), cross.name, inputs)
    assert torch.equal(rows, odd(inputs["input_ids"]))
    for edit in (al.Hide(cross.name, keys=odd), al.Zero(tower.name, queries=odd)):
        with pytest.raises(InputError, match="ids of this pass"), subject.edit(edit):
            subject.run(inputs, keep="z")


def test_images_as_many_as_the_tokens_are_no_tokens_either() -> None:
    subject = lens("mllama")
    cross = next(site for site in subject.anatomy.sites if site.kind == "cross")
    tower = next(site for site in subject.anatomy.sites if site.stack.startswith("vision"))
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 12, 8), torch.zeros(1, 2, 12, 8), 0)
    running, stream, heads = Running(), torch.zeros(1, 12, 32), torch.zeros(1, 4, 12, 8)
    mask = torch.tensor([[0] * 4 + [1] * 8])
    running.begin({"input_ids": IDS, "attention_mask": mask})
    asked = Asked(subject.model, "sdpa", heads, heads, heads, None, {})
    with pytest.raises(InputError, match="ids of this pass"):
        running.at(cross, asked, torch.tensor([0]), None, odd)
    with pytest.raises(InputError, match="ids of this pass"):
        running.rows_of_stream(tower, stream, odd)
    assert running.rows_of_stream(tower, stream, None) == (None, 0)
    # A mask of another length than the text's tells nothing of its padding.
    assert running.rows_of_stream(subject.anatomy["L0"], stream[:, :5], None) == (None, 0)
    running.begin({"input_ids": IDS, "past_key_values": cache})
    assert running.rows_of_stream(tower, stream, None) == (None, 0)
    assert running.rows_of_stream(subject.anatomy["L0"], stream, None) == (None, 12)


def test_ids_are_those_of_the_pass_that_runs() -> None:
    subject = lens("llama")
    model: Any = subject.model
    edit = al.Zero("L1", queries=odd)
    other = IDS + 1

    def z(ids: Tensor) -> Tensor:
        return subject.run(ids, keep="z").z["L1"].eq(0).all(3).all(1)

    with subject.edit(edit):
        assert torch.equal(z(IDS), odd(IDS))
        assert torch.equal(z(other), odd(other))
        assert torch.equal(z(torch.cat([IDS, other])), odd(torch.cat([IDS, other])))
    cache = DynamicCache(config=model.config)
    says = "ids of this pass are not known"
    with torch.no_grad():
        model(input_ids=IDS[:, :8], past_key_values=cache)
        with subject.edit(edit):
            model(input_ids=torch.cat([IDS, IDS]))
            with pytest.raises(InputError, match=says):
                model(input_ids=IDS[:, 8:], past_key_values=cache)
            model(input_ids=IDS)
            with pytest.raises(InputError, match=says):
                model(inputs_embeds=model.get_input_embeddings()(IDS))


def test_a_pass_of_another_thread_in_the_midst_changes_nothing() -> None:
    subject = lens("llama")
    model: Any = subject.model
    edit, started = al.Zero("L1", queries=odd), threading.get_ident()
    with subject.edit(edit), torch.no_grad():
        wanted = model(input_ids=IDS).logits

    def elsewhere() -> None:
        with torch.no_grad():
            model(input_ids=IDS + 1)

    def start(*_: object) -> None:
        if threading.get_ident() == started:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    with subject.edit(edit), torch.no_grad():
        handle = model.get_submodule("model.layers.0").register_forward_hook(start)
        found = model(input_ids=IDS).logits
        handle.remove()
    assert torch.equal(found, wanted)


def test_after_an_error_in_a_pass_generate_knows_its_encoders_ids() -> None:
    subject = lens("t5")
    model: Any = subject.model
    settings = {"decoder_start_token_id": 2, "max_new_tokens": 2, "do_sample": False}
    with subject.edit(al.Zero("enc.L0", queries=odd)):
        wanted = model.generate(IDS + 1, **settings)
    with subject.edit(al.Zero("enc.L0", queries=odd)):
        with pytest.raises(IndexError):
            model(input_ids=IDS, decoder_input_ids=IDS + 10_000)
        assert torch.equal(model.generate(IDS + 1, **settings), wanted)


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_layers_with_windows_name_the_same_keys(name: str) -> None:
    """Past the window each layer holds keys of its own number: an edit of both names one token."""
    subject = lens(name)
    model: Any = subject.model
    text = torch.cat([IDS, IDS + 12], dim=1)
    edit = al.Hide("L0,L1", keys=[13, 18])
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), subject.edit(edit):
        whole = model(input_ids=text, use_cache=False).logits
        model(input_ids=text[:, :20], past_key_values=cache)
        rest = [
            model(input_ids=text[:, place : place + 1], past_key_values=cache).logits[:, 0]
            for place in range(20, 24)
        ]
    torch.testing.assert_close(torch.stack(rest, 1), whole[:, 20:], atol=2e-5, rtol=1e-4)


def test_keys_of_a_static_cache_are_steered_at_their_places() -> None:
    subject = lens("llama")
    model: Any = subject.model
    edit = al.Steer("L1H1", "k", {"L1": torch.ones(2, 8)}, keys=[0, -1])
    found: list[Tensor] = []
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=20),
    ):
        with torch.no_grad(), subject.edit(edit):
            model(input_ids=IDS, past_key_values=cache)
            found.append(model(input_ids=IDS[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(*found)


def test_a_position_yet_to_come_waits_for_its_pass() -> None:
    subject = lens("llama")
    model: Any = subject.model
    mask = torch.zeros(1, 12, dtype=torch.bool)
    zeroed: list[bool] = []
    module = model.get_submodule("model.layers.1.self_attn.o_proj")
    handle = module.register_forward_pre_hook(lambda _, a: zeroed.append(bool(a[0].eq(0).all())))
    cache = DynamicCache(config=model.config)
    edits = [al.Zero("L1", queries=[13, 0], phase="decode"), al.Zero("L0", queries=mask)]
    with torch.no_grad(), subject.edit(*edits):
        model(input_ids=IDS, past_key_values=cache)
        for _ in range(3):
            model(input_ids=IDS[:, :1], past_key_values=cache)
    handle.remove()
    assert zeroed == [False, False, True, False]


def test_means_by_position_count_real_tokens_and_go_on() -> None:
    subject = lens("llama")
    model: Any = subject.model
    means = {"L0": torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(0))}
    padded = torch.cat([torch.ones(1, 4).long(), IDS[:, :8]], dim=1)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "pad_token_id": 1, "eos_token_id": 10_000}
    mask = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
    with subject.edit(al.Mean("L0", means)):
        alone = model.generate(IDS[:, :8], **settings).logits
        together = model.generate(torch.cat([IDS, padded]), attention_mask=mask, **settings).logits
    for one, two in zip(alone, together, strict=True):
        torch.testing.assert_close(one[0], two[1], atol=2e-5, rtol=1e-4)


def test_runs_of_a_shared_block_are_counted_anew_after_an_error_and_beside_other_threads() -> None:
    """Albert's layers are calls of one block."""
    subject = lens("albert")
    model: Any = subject.model
    edit = al.SteerStream("L1", vectors={"L1": torch.ones(32)})
    started, seen = threading.get_ident(), []

    def elsewhere() -> None:
        with torch.no_grad():
            model(input_ids=IDS + 1)

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    def start(*_: object) -> None:
        if threading.get_ident() == started and not seen:
            seen.append(True)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    block = model.get_submodule(subject.anatomy["L1"].block)
    with torch.no_grad(), subject.edit(edit):
        wanted = model(input_ids=IDS)[0]
        for hook in (fail, start):
            handle = block.register_forward_hook(hook)
            if hook is fail:
                with pytest.raises(RuntimeError, match="stop"):
                    model(input_ids=IDS)
                handle.remove()
            assert torch.equal(model(input_ids=IDS)[0], wanted)
            handle.remove()
    assert seen
