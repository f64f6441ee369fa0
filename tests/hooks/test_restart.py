"""A forward that goes on from a layer gives what the full forward gives, and computes less."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import SeamError, UnsupportedModelError
from attnlens.hooks.edits import Editor, Zero
from attnlens.hooks.probe import examine, output_tensors
from attnlens.hooks.reads import ReadRows
from attnlens.hooks.restart import Record, Recording, Restart, block_names
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer, Session
from tests.architectures import ARCHITECTURES, Inputs

SHARED = {"albert"}  # one block for all layers
GATED = {  # a gate, a norm or a cut stands between z and the output projection
    "bitnet",
    "diffllama",
    "qwen3_next",
    "moonshine",
}
DAILY = {
    *("gpt2", "opt", "gpt_neox", "llama", "gemma2", "cohere", "mixtral", "gpt_oss", "deepseek_v3"),
    *("longcat_flash", "jamba", "zamba2", "falcon_h1", "bert", "distilbert", "modernbert"),
    *("t5", "t5gemma", "bart", "whisper", "vit", "swin", "clip", "llava", "qwen2_vl", "wav2vec2"),
    *GATED,
}
EVERY = [
    pytest.param(name, marks=[] if name in DAILY else [pytest.mark.long])
    for name in ARCHITECTURES
    if name not in SHARED
]
# The same operations on the same numbers in float64, but for products of another height.
ROUNDING = 1e-10


class Put(Observer):
    """Puts z at a site in a full forward: what a restarted one has to give."""

    def __init__(self, site: Site, z: Tensor) -> None:
        self.sites = frozenset({site.name})
        self._z = z

    def see(self, site: Site, call: Call) -> Call:
        return replace(call, output=self._z.reshape(call.output.shape))


class Model:
    """A model of the catalogue, in float64 where it has one, and its recorded clean run."""

    def __init__(self, name: str, side: str | None = None) -> None:
        architecture = ARCHITECTURES[name]
        self.model: Any = architecture.build()
        if architecture.float64:
            self.model.double()
        inputs = architecture.inputs(self.model)
        self.anatomy: Anatomy = examine(self.model, self._without_cache(inputs))
        if side is not None:
            assert architecture.padded is not None
            inputs = architecture.padded(self.model, side)
        self.inputs = self._without_cache(inputs)
        self.recording = self.record()
        # A tower that attends once an image is seen by a session for so many images only.
        self.packed = any(site.call for site in self.anatomy.sites)

    def _without_cache(self, inputs: Inputs) -> dict[str, Any]:
        takes = hasattr(self.model.config.get_text_config(), "use_cache")
        return {**inputs, **({"use_cache": False} if takes else {})}

    def record(self, *sites: Site) -> Recording:
        record = Record(self.anatomy, sites or None)
        self.run(record)
        return record.recording

    @torch.no_grad()
    def run(self, *observers: Observer, times: int = 1) -> list[Tensor]:
        with Session(self.model, self.anatomy, observers):
            return [
                tensor.nan_to_num() for tensor in output_tensors(self.model(**self.copies(times)))
            ]

    def copies(self, times: int) -> dict[str, Any]:
        return {
            name: value.repeat(times, *[1] * (value.ndim - 1))
            if isinstance(value, Tensor)
            else value
            for name, value in self.inputs.items()
        }

    def zeroed(self, site: Site, heads: Sequence[int]) -> Tensor:
        """Clean z of a site, a copy for each head, in which that head is 0."""
        copies = [self.recording.of(site.name).call.output.clone() for _ in heads]
        for copy, head in zip(copies, heads, strict=True):
            copy[:, :, head] = 0
        return torch.cat(copies)


@cache
def opened(name: str, side: str | None = None) -> Model:
    return Model(name, side)


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= ROUNDING * other.abs().max().clamp(min=1)


def check_every_site(subject: Model) -> None:
    full = subject.run()
    for site in subject.anatomy.sites:
        assert_same(subject.run(Restart(subject.recording, site)), full)
        edit = Editor(subject.anatomy, [Zero(f"{site.name}H1")])
        edited = subject.run(Editor(subject.anatomy, [Zero(f"{site.name}H1")]))
        assert_same(subject.run(Restart(subject.recording, site), edit), edited)
        if subject.recording.of(site.name).takes_z:
            times = 1 if subject.packed else min(3, site.heads)
            z = subject.zeroed(site, range(times))
            found = subject.run(Restart(subject.recording, site, times, z), times=times)
            wanted = subject.run(Put(site, z), times=times)
            assert_same(found, wanted)
            assert any(not torch.equal(a[: len(b)], b) for a, b in zip(found, full, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_going_on_from_every_site_is_the_full_forward(name: str) -> None:
    subject = opened(name)
    check_every_site(subject)
    sites = [site for site in subject.anatomy.sites if not site.name.startswith("vision")]
    takes = {subject.recording.of(site.name).takes_z for site in sites}
    assert takes == {name not in GATED}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert", "t5", "bart"])
def test_going_on_in_padded_batches(name: str, side: str) -> None:
    check_every_site(opened(name, side))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "gpt_oss"])
def test_copies_with_a_head_at_zero_are_the_edit(name: str) -> None:
    subject = opened(name)
    site = subject.anatomy.sites[-1]
    z = subject.zeroed(site, range(site.heads))
    found = subject.run(Restart(subject.recording, site, site.heads, z), times=site.heads)
    for head in range(site.heads):
        own = [tensor.chunk(site.heads)[head] for tensor in found if len(tensor) > 2]
        edited = subject.run(Editor(subject.anatomy, [Zero(f"{site.name}H{head}")]))
        assert_same(own[:1], edited[:1])


@given(data=st.data())
def test_any_site_any_copies_any_heads(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["gpt2", "llama", "bert", "t5"]))
    subject = opened(name, data.draw(st.sampled_from([None, "left", "right"])))
    site = data.draw(st.sampled_from(subject.anatomy.sites))
    times = data.draw(st.integers(1, 4))
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=16, max_size=16))).double()
    clean = subject.recording.of(site.name).call.output
    shape = (times, 1, 1, site.heads, 1)
    z = (clean[None] * keep[: times * site.heads].reshape(shape)).flatten(0, 1)
    found = subject.run(Restart(subject.recording, site, times, z), times=times)
    assert_same(found, subject.run(Put(site, z), times=times))


def test_one_prompt_in_copies() -> None:
    """A batch of one is what position biases have too."""
    for name in ("t5", "llama"):
        subject = Model(name)
        subject.inputs = {
            key: value[:1] if isinstance(value, Tensor) else value
            for key, value in subject.inputs.items()
        }
        subject.recording = subject.record()
        for site in subject.anatomy.sites:
            z = subject.zeroed(site, range(3))
            found = subject.run(Restart(subject.recording, site, 3, z), times=3)
            assert_same(found, subject.run(Put(site, z), times=3))


def counted(subject: Model, *observers: Observer) -> Counter[str]:
    """How often each module computed something in a run: modules whose forward is their own."""
    found: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: found.update([name]))
        for name, module in subject.model.named_modules()
        if not list(module.children())
    ]
    subject.run(*observers)
    for handle in handles:
        handle.remove()
    return found


def test_what_came_before_does_not_run() -> None:
    subject = opened("llama")
    site = subject.anatomy["L1"]
    full = counted(subject)
    assert full["model.layers.0.mlp.down_proj"] == 1
    restarted = counted(subject, Restart(subject.recording, site))
    assert set(full) - set(restarted) == {n for n in full if n.startswith("model.layers.0.")}
    z = subject.zeroed(site, [0])
    without = counted(subject, Restart(subject.recording, site, 1, z))
    own = {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}
    assert set(restarted) - set(without) == own


def test_an_encoder_does_not_run_for_a_site_of_the_decoder() -> None:
    subject = opened("t5")
    site = subject.anatomy["cross.L1"]
    z = subject.zeroed(site, [0])
    ran = counted(subject, Restart(subject.recording, site, 1, z))
    assert not [name for name in ran if name.startswith(("encoder.block", "decoder.block.0"))]
    block = {name for name in ran if name.startswith("decoder.block.1.")}
    assert not [name for name in block if "SelfAttention" in name]
    assert {name for name in block if "EncDec" in name} == {
        "decoder.block.1.layer.1.EncDecAttention.o"
    }


def test_layers_without_attention_are_skipped_too() -> None:
    subject = opened("jamba")
    names = block_names(subject.model, subject.anatomy)
    assert names == [f"model.layers.{i}" for i in range(len(subject.model.model.layers))]
    site = subject.anatomy.sites[-1]
    ran = counted(subject, Restart(subject.recording, site))
    assert site.block is not None
    before = names[: names.index(site.block)]
    assert before
    assert not [name for name in ran if any(name.startswith(b + ".") for b in before)]


def state(model: nn.Module) -> list[Any]:
    """Everything that a session might leave on a model, by identity."""
    found: list[Any] = []
    for name, module in model.named_modules():
        held = {key: id(value) for key, value in vars(module).items()}
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        found.append((name, held, [dict(hook) for hook in hooks], module.training))
    return found


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_all_is_as_before_after_an_exception_in_the_middle(name: str) -> None:
    subject = Model(name)
    site = subject.anatomy.sites[-1]
    assert site.output is not None
    failing = subject.model.get_submodule(site.output)
    clean = subject.run()

    def fail(*_: object) -> None:
        raise MemoryError

    handle = failing.register_forward_hook(fail)
    before = state(subject.model)
    z = subject.zeroed(site, [0])
    for observer in (
        Restart(subject.recording, site),
        Restart(subject.recording, site, 1, z),
        Record(subject.anatomy),
        ReadRows(subject.anatomy, torch.zeros(2, 1, dtype=torch.long)),
    ):
        with pytest.raises(MemoryError):
            subject.run(observer)
        assert state(subject.model) == before
    handle.remove()
    assert_same(subject.run(), clean)


def test_a_forward_that_was_put_on_a_module_comes_back() -> None:
    """As accelerate puts one on the modules that it moves."""
    subject = Model("llama")
    calls: list[str] = []
    layers = subject.model.model.layers
    own = layers[0].forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("own")
        return own(*args, **kwargs)

    layers[0].forward = forward
    full = subject.run()
    assert_same(subject.run(Restart(subject.recording, subject.anatomy["L1"])), full)
    assert calls == ["own"]
    assert vars(layers[0])["forward"] is forward
    assert "forward" not in vars(layers[1])


def test_another_thread_gets_the_models_own_forward() -> None:
    subject = opened("gpt2")
    site = subject.anatomy["L2"]
    found: list[Tensor] = []

    def other() -> None:
        with torch.no_grad():
            found.append(subject.model(**subject.copies(3)).logits)

    z = torch.zeros_like(subject.recording.of("L2").call.output)
    with Session(subject.model, subject.anatomy, [Restart(subject.recording, site, 1, z)]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert_same([found[0][:2]], subject.run()[:1])


def test_a_recording_is_read_and_not_written() -> None:
    subject = opened("opt")
    values = [
        tensor.clone() for run in subject.recording.ran for tensor in output_tensors(run.value)
    ]
    for site in subject.anatomy.sites:
        subject.run(Restart(subject.recording, site))
    after = [tensor for run in subject.recording.ran for tensor in output_tensors(run.value)]
    assert all(torch.equal(a, b) for a, b in zip(values, after, strict=True))


def test_streams_that_are_written_to_later_are_kept_as_they_were() -> None:
    subject = Model("llama")

    def write(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(1.0)

    subject.model.model.layers[1].register_forward_pre_hook(write)
    subject.recording = subject.record()
    assert_same(subject.run(Restart(subject.recording, subject.anatomy["L1"])), subject.run())


def test_streams_that_others_read_are_told_from_those_only_passed_on() -> None:
    """Of the latter copies are shapes alone, so that a tower's states that are read must not be."""
    passed = {run.name for run in opened("gpt2").recording.ran if run.passed}
    assert passed == {"transformer.h.0"}  # that the last two are not read elsewhere is not known
    kept: list[Any] = []
    subject = Model("gpt2")
    subject.model.transformer.h[0].register_forward_hook(lambda *call: kept.append(call[2]))
    assert not any(run.passed for run in subject.record().ran)


def test_states_that_the_model_returns_are_copied_in_full() -> None:
    subject = Model("gpt2")
    subject.inputs["output_hidden_states"] = True
    subject.recording = subject.record()
    site = subject.anatomy["L2"]
    z = subject.zeroed(site, [0, 1])
    found = subject.run(Restart(subject.recording, site, 2, z), times=2)
    assert_same(found, subject.run(Put(site, z), times=2))


def test_z_is_refused_where_something_follows_the_projection() -> None:
    subject = Model("llama")
    attention = subject.model.model.layers[0].self_attn
    attention.register_forward_hook(lambda _, __, output: (output[0] * 0.5, *output[1:]))
    recording = subject.record()
    assert [recording.of(f"L{i}").takes_z for i in range(2)] == [False, True]


def test_what_a_recording_holds_is_counted() -> None:
    subject = opened("llama")
    config = subject.model.config
    tokens = subject.inputs["input_ids"].numel()
    streams = 2 * config.num_hidden_layers * tokens * config.hidden_size  # blocks and attention
    site = subject.anatomy["L0"]
    widths = site.heads * (site.d_qk + site.d_v) + site.groups * (site.d_qk + site.d_v)
    assert subject.recording.bytes == 8 * (streams + config.num_hidden_layers * tokens * widths)
    one = subject.record(site)
    assert one.bytes == 8 * (tokens * config.hidden_size * 3 + tokens * widths)


def test_weights_that_a_kernel_returns_are_not_held() -> None:
    subject = Model("llama")
    subject.model.set_attn_implementation("eager")
    eager = subject.record()
    assert eager.bytes <= subject.recording.bytes + 8 * 2 * 16 * 16  # the mask, once
    site = subject.anatomy["L1"]
    assert_same(subject.run(Restart(eager, site)), subject.run())


def test_a_shared_block_cannot_be_gone_on_from() -> None:
    subject = opened("albert")
    assert subject.recording.reason is not None
    with pytest.raises(UnsupportedModelError, match="more than once"):
        Restart(subject.recording, subject.anatomy["L1"])


def test_z_is_refused_where_it_is_not_what_is_projected() -> None:
    subject = opened("diffllama")
    site = subject.anatomy["L1"]
    with pytest.raises(UnsupportedModelError, match="without z"):
        Restart(subject.recording, site, 1, subject.zeroed(site, [0]))


def test_other_inputs_than_the_recorded_are_refused() -> None:
    subject = opened("gpt2")
    site = subject.anatomy["L1"]
    with pytest.raises(SeamError, match="3 copies of the recorded batch"):
        subject.run(Restart(subject.recording, site, 3), times=2)
    with pytest.raises(SeamError, match="L0"):
        Restart(subject.record(site), subject.anatomy["L0"])
    with pytest.raises(SeamError, match="No forward was recorded"):
        _ = Record(subject.anatomy).recording


def test_a_module_that_is_not_come_by_is_an_error() -> None:
    subject = Model("t5")
    site = subject.anatomy["dec.L1"]
    with torch.no_grad():
        encoded = subject.model.get_encoder()(subject.inputs["input_ids"])
    subject.inputs["encoder_outputs"] = encoded
    with pytest.raises(SeamError, match=r"did not run encoder\.block\.0"):
        subject.run(Restart(subject.recording, site))


READ = ["gpt2", "llama", "opt", "cohere", "bert", "modernbert", "t5", "bart", "whisper", "t5gemma"]


@pytest.mark.parametrize("name", READ)
def test_logits_of_the_positions_read(name: str) -> None:
    subject = opened(name)
    (logits, *_) = subject.run()
    reads = torch.tensor([[2, 0, 5], [7, 7, 1]])
    (found, *_) = subject.run(ReadRows(subject.anatomy, reads))
    wanted = logits.gather(1, reads[..., None].expand(-1, -1, logits.shape[2]))
    assert_same([found], [wanted])


def test_reads_that_cannot_be_found_are_an_error() -> None:
    subject = Model("gpt2")
    with pytest.raises(SeamError, match="cannot be found"):
        subject.run(ReadRows(subject.anatomy, torch.tensor([[99], [1]])))
    with pytest.raises(SeamError, match="cannot be found"):
        subject.run(ReadRows(subject.anatomy, torch.tensor([[1]])))
    subject.inputs["logits_to_keep"] = 1
    with pytest.raises(SeamError, match="logits_to_keep"):
        subject.run(ReadRows(subject.anatomy, torch.tensor([[3], [1]])))
    vision = opened("vit")
    with pytest.raises(UnsupportedModelError, match="no unembedding"):
        ReadRows(vision.anatomy, torch.tensor([[3], [1]]))


def test_an_unembedding_that_is_not_run_is_an_error() -> None:
    """A model that computes its logits with the weight alone."""
    subject = Model("gpt2")
    head = subject.model.lm_head

    class Tied(nn.Module):
        weight = head.weight

        def __call__(self, hidden: Tensor) -> Tensor:
            return hidden @ self.weight.T

    subject.model.lm_head = Tied()
    with pytest.raises(UnsupportedModelError, match="did not run"):
        subject.run(ReadRows(subject.anatomy, torch.tensor([[3], [1]])))
