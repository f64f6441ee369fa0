"""A session leaves nothing behind, sees what it should, and says so when it did not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnlens as al
from attnlens.anatomy import Anatomy, Site
from attnlens.errors import SeamError
from attnlens.hooks import seam
from attnlens.hooks.edits import Edit, Editor
from attnlens.hooks.probe import examine
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer, Session
from tests.architectures import ARCHITECTURES, Inputs
from tests.oracles.attention import record


@dataclass
class Watch(Observer):
    """Observer that counts, and fails where it is told to."""

    sites: frozenset[str]
    fail: str = ""
    seen: list[str] = field(default_factory=list)

    def attach(self, model: nn.Module) -> list[Any]:
        if self.fail == "attach":
            raise RuntimeError("attach")
        return [model.register_forward_hook(lambda *_: None)]

    def see(self, site: Site, call: Call) -> Call:
        if self.fail == "see":
            raise RuntimeError("see")
        self.seen.append(site.name)
        return call


@dataclass
class Opened:
    """A model with an input and its anatomy."""

    model: Any
    inputs: Inputs
    anatomy: Anatomy

    def logits(self, model: Any = None) -> Tensor:
        with torch.no_grad():
            return (model or self.model)(**self.inputs).logits

    def edit(self, *edits: Edit, model: Any = None) -> Session:
        return Session(model or self.model, self.anatomy, [Editor(self.anatomy, edits)])


def opened(name: str) -> Opened:
    model = ARCHITECTURES[name].build()
    inputs = ARCHITECTURES[name].inputs(model)
    return Opened(model, inputs, examine(model, inputs))


@pytest.fixture
def gpt2() -> Opened:
    return opened("gpt2")


def condition(model: nn.Module) -> list[object]:
    """Everything a session might leave on a model."""
    found: list[object] = [
        config._attn_implementation_internal for config in seam.attention_configs(model)
    ]
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        always = module._forward_hooks_always_called
        found.append((name, *map(len, hooks), len(always), module.training, sorted(vars(module))))
    return found


@pytest.fixture
def untouched(gpt2: Opened) -> Iterator[None]:
    """The model is in the end what it was in the beginning, weights included."""
    before = condition(gpt2.model)
    weights = {name: weight.clone() for name, weight in gpt2.model.state_dict().items()}
    logits = gpt2.logits()
    assert not seam._switched._held
    yield
    assert condition(gpt2.model) == before
    assert not any("_attnlens_listeners" in vars(module) for module in gpt2.model.modules())
    assert not seam._switched._held
    for name, weight in gpt2.model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert torch.equal(gpt2.logits(), logits)


@pytest.mark.usefixtures("untouched")
class TestRestores:
    def test_after_a_normal_exit(self, gpt2: Opened) -> None:
        watch = Watch(frozenset({"L0", "L2"}))
        with Session(gpt2.model, gpt2.anatomy, [watch]):
            gpt2.logits()
        assert watch.seen == ["L0", "L2"]

    @pytest.mark.parametrize("point", ["attach", "see"])
    def test_after_an_observer_failed(self, gpt2: Opened, point: str) -> None:
        watches = [Watch(frozenset({"L0"})), Watch(frozenset({"L1"}), fail=point)]
        session = Session(gpt2.model, gpt2.anatomy, watches)
        with pytest.raises(RuntimeError, match=point), session:
            gpt2.logits()

    def test_after_a_handle_failed(self, gpt2: Opened) -> None:
        class Stuck(Observer):
            def attach(self, model: nn.Module) -> list[Stuck]:
                return [self]

            def remove(self) -> None:
                raise ValueError("stuck")

        watch = Watch(frozenset({"L0"}))
        session = Session(gpt2.model, gpt2.anatomy, [watch, Stuck(), watch])
        with pytest.raises(ValueError, match="stuck"), session:
            gpt2.logits()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_after_the_forward_failed(self, gpt2: Opened, error: type[BaseException]) -> None:
        def fail(*_: object) -> None:
            raise error

        handle = gpt2.model.transformer.h[1].register_forward_pre_hook(fail)
        with pytest.raises(error), gpt2.edit(al.Zero("L0H1")):
            gpt2.logits()
        handle.remove()

    def test_after_the_body_failed(self, gpt2: Opened) -> None:
        with pytest.raises(KeyError), gpt2.edit(al.Zero("all")):
            raise KeyError

    def test_after_a_module_was_missing(self, gpt2: Opened) -> None:
        other = opened("llama").anatomy
        with pytest.raises(AttributeError):
            Session(gpt2.model, other, [Watch(frozenset({"L0"}))]).__enter__()

    def test_in_train_mode_with_gradients_pending(self, gpt2: Opened) -> None:
        lens = al.Lens(gpt2.model, example=gpt2.inputs)
        model = gpt2.model.train()
        model.transformer.h[0].eval()
        modes = [module.training for module in model.modules()]
        model(**gpt2.inputs, labels=gpt2.inputs["input_ids"]).loss.backward()
        gradients = [weight.grad.clone() for weight in model.parameters()]
        first = lens.run(gpt2.inputs).pattern["L1"]
        lens.measure(gpt2.inputs, al.Entropy())
        lens.check()
        assert torch.equal(lens.run(gpt2.inputs).pattern["L1"], first)  # no dropout
        assert [module.training for module in model.modules()] == modes
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(weight.grad, gradient)
        model.eval()

    def test_nested_sessions(self, gpt2: Opened) -> None:
        zero, watch = al.Zero("L1H2"), Watch(frozenset({"L1"}))
        with gpt2.edit(zero):
            edited = gpt2.logits()
            with Session(gpt2.model, gpt2.anatomy, [watch]):
                assert torch.equal(gpt2.logits(), edited)
            assert torch.equal(gpt2.logits(), edited)
        assert watch.seen == ["L1"]

    def test_closing_twice(self, gpt2: Opened) -> None:
        session = gpt2.edit(al.Zero("L0"))
        session.__enter__()
        session.close()
        session.close()
        assert gpt2.model.config._attn_implementation == "sdpa"
        assert not any("_attnlens_listeners" in vars(m) for m in gpt2.model.modules())


def test_an_inner_session_sees_what_an_outer_one_changed(gpt2: Opened) -> None:
    with gpt2.edit(al.Zero("L1H2")):
        inner = record(gpt2.model, gpt2.anatomy, gpt2.inputs)
    output = inner.calls["L1"].output
    assert output[:, :, 2].eq(0).all()
    assert output[:, :, 3].ne(0).any()


def test_two_models_of_one_config(gpt2: Opened) -> None:
    """transformers reads the switch from the config: the other model must not notice."""
    config = gpt2.model.config
    other = type(gpt2.model)(config).eval()
    assert other.config is config
    alone = gpt2.logits(other)
    with gpt2.edit(al.Zero("all")):
        assert torch.equal(gpt2.logits(other), alone)
        assert not torch.equal(gpt2.logits(), gpt2.logits(other))


def test_two_models_of_one_config_closed_in_any_order(gpt2: Opened) -> None:
    model, config = gpt2.model, gpt2.model.config
    other = type(model)(config).eval()
    plain, alone = gpt2.logits(), gpt2.logits(other)
    first, second = gpt2.edit(al.Zero("L0")), gpt2.edit(al.Zero("L1"), model=other)
    first.__enter__()
    second.__enter__()
    first.close()
    assert torch.equal(gpt2.logits(), plain)
    assert not torch.equal(gpt2.logits(other), alone)
    second.close()
    assert torch.equal(gpt2.logits(other), alone)
    assert config._attn_implementation == "sdpa"


def test_two_threads_with_two_models() -> None:
    """Edits in one thread and captures in the other give what each gives alone."""
    left, right = opened("llama"), opened("mistral")
    edits = (al.Zero("L0H1"), al.Uniform("L1"))
    with left.edit(*edits):
        edited = left.logits()
    plain = right.logits()
    wrong: list[str] = []

    def edit() -> None:
        for _ in range(20):
            with left.edit(*edits):
                if not torch.equal(left.logits(), edited):
                    wrong.append("edit")

    def watch() -> None:
        for _ in range(20):
            observer = Watch(frozenset({"L0", "L1"}))
            with Session(right.model, right.anatomy, [observer]):
                if not torch.equal(right.logits(), plain):
                    wrong.append("watch")
            if observer.seen != ["L0", "L1"]:
                wrong.append("seen")

    threads = [threading.Thread(target=edit), threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_threads_calls_are_not_seen(gpt2: Opened) -> None:
    plain = gpt2.logits()
    found: list[Tensor] = []

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: found.append(gpt2.logits()))
        thread.start()
        thread.join()

    with pytest.raises(SeamError, match="L0"), gpt2.edit(al.Zero("L0")):
        elsewhere()
    assert torch.equal(found[0], plain)


def test_another_threads_forward_does_not_disturb_the_count() -> None:
    """Albert attends three times with one module; a forward in between must not disturb it."""
    albert = opened("albert")
    plain = albert.logits()

    @dataclass
    class Interrupt(Watch):
        def see(self, site: Site, call: Call) -> Call:
            thread = threading.Thread(target=albert.logits)
            thread.start()
            thread.join()
            return super().see(site, call)

    observer = Interrupt(frozenset({"L0", "L1", "L2"}))
    with Session(albert.model, albert.anatomy, [observer]):
        assert torch.equal(albert.logits(), plain)
    assert observer.seen == ["L0", "L1", "L2"]


def test_calls_after_a_failed_forward_are_counted_anew() -> None:
    albert = opened("albert")
    inner = albert.model.albert
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("third layer")

    watch = Watch(frozenset({"L0", "L1", "L2"}))
    with Session(albert.model, albert.anatomy, [watch]):
        with _hook(inner, fail), pytest.raises(RuntimeError, match="third layer"):
            albert.logits()
        watch.seen.clear()
        inner(**albert.inputs)
        albert.logits()
    assert watch.seen == ["L0", "L1", "L2"] * 2


def _hook(model: Any, hook: Any) -> Any:
    return model.encoder.albert_layer_groups[0].albert_layers[0].register_forward_pre_hook(hook)


@pytest.mark.parametrize("edit", [al.Zero("L0H1"), al.Uniform("L1H0,L0H3"), al.Scale("L1", 0.5)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_generate_under_an_edit_is_the_uncached_computation(name: str, edit: Edit) -> None:
    subject = opened(name)
    prompt = subject.inputs["input_ids"][:1, :7]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = subject.model.generate(prompt, **settings)
    with subject.edit(edit), torch.no_grad():
        out = subject.model.generate(
            prompt, **settings, output_logits=True, return_dict_in_generate=True
        )
        ids, logits = prompt, []
        for _ in range(6):
            logits.append(subject.model(input_ids=ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out.sequences, ids)
    assert (torch.stack(out.logits) - torch.stack(logits)).abs().max() < 1e-4
    assert torch.equal(subject.model.generate(prompt, **settings), plain)
    with torch.no_grad():
        first = subject.model(input_ids=prompt).logits[:, -1]
    assert not torch.equal(first, out.logits[0])


def test_a_site_that_never_fired_is_an_error() -> None:
    bart = opened("bart")
    session = bart.edit(al.Zero("cross.L0"), al.Zero("dec.L1"), al.Zero("enc.L0"))
    with pytest.raises(SeamError, match=r"cross\.L0, dec\.L1"), session:
        bart.model.get_encoder()(bart.inputs["input_ids"])


def test_a_session_without_a_run_is_an_error(gpt2: Opened) -> None:
    with pytest.raises(SeamError, match="L0"), gpt2.edit(al.Zero("L0")):
        pass


def test_more_calls_than_examined_is_an_error() -> None:
    """The tower of qwen2_vl attends once an image."""
    qwen = opened("qwen2_vl")
    fewer = [site for site in qwen.anatomy.sites if not (site.stack == "vision" and site.call)]
    vision = [site for site in qwen.anatomy.sites if site.stack == "vision"]
    assert len(vision) > len([site for site in fewer if site.stack == "vision"])
    anatomy = Anatomy(**{**vars(qwen.anatomy), "sites": tuple(fewer)})
    session = Session(qwen.model, anatomy, [Watch(frozenset({vision[0].name}))])
    with pytest.raises(SeamError, match="more often"), session:
        qwen.model(**qwen.inputs)


def test_a_session_opens_once(gpt2: Opened) -> None:
    with gpt2.edit(al.Zero("L0")) as session:
        with pytest.raises(SeamError, match="open already"):
            session.__enter__()
        gpt2.logits()


def test_the_kernel_is_not_changed_under_a_session(gpt2: Opened) -> None:
    """The seam keeps its kernel: rows compared under another one would be of neither."""
    with gpt2.edit(al.Zero("L0")):
        with pytest.raises(SeamError, match="session"), seam.kernel(gpt2.model, "eager"):
            pass
        gpt2.logits()


def test_the_kernel_is_the_models_own_again(gpt2: Opened) -> None:

    def fail() -> None:
        assert gpt2.model.config._attn_implementation == "eager"
        raise ValueError

    with pytest.raises(ValueError), seam.kernel(gpt2.model, "eager"):
        fail()
    assert gpt2.model.config._attn_implementation == "sdpa"


def test_names_of_kernels_are_told_by_the_config_alone() -> None:
    assert seam.kernel_of(None) == "sdpa"
    assert seam.kernel_of("eager") == "eager"
    assert seam.kernel_of(seam._register("sdpa")) == "sdpa"
    assert not any(word in seam._register("sdpa") for word in ("sdpa", "flash", "flex"))
