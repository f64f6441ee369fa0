"""Every edit, on many kinds of models, against a dense recomputation in float64.

The oracle is the model's own eager attention: its weights `A` and its values. A row `A'` that an
edit should make follows from `A` alone: hiding keys and adding a bias multiply weights and divide
by what is left, learned sinks included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnlens as al
from attnlens.anatomy import Site
from attnlens.errors import SeamError
from attnlens.hooks import seam
from attnlens.hooks.edits import Edit
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES, Inputs
from tests.oracles.attention import Recorder, record
from tests.test_architectures import tensors

NAMES = [
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "llama",
    "mistral",
    "gemma2",
    "qwen3",
    "phi3",
    "cohere2",
    "deepseek_v3",
    "diffllama",
    "gpt_oss",
    "mixtral",
    "jamba",
    "bert",
    "modernbert",
    "albert",
    "t5",
    "bart",
    "t5gemma",
    "whisper",
    "vit",
    "swin",
    "clip",
    "llava",
    "mllama",
]
EVERY = pytest.mark.parametrize("name", NAMES)
ROWS, KEYS, BIAS, SHARE = [1, 3, -1], slice(1, 3), 0.75, 0.3


@dataclass(frozen=True)
class Subject:
    """A model in float64, what it does on its inputs, and what it does on others of equal shape."""

    lens: Lens
    inputs: Inputs
    plain: Recorder
    eager: Recorder
    other_inputs: Inputs
    other: Recorder

    @property
    def model(self) -> Any:
        return self.lens.model

    @property
    def last(self) -> list[Site]:
        """The last site of each stack: what an edit there gets is what the plain run had."""
        return list({site.stack: site for site in self.lens.anatomy.sites}.values())


@cache
def subject(name: str) -> Subject:
    model = ARCHITECTURES[name].build().double()
    inputs = ARCHITECTURES[name].inputs(model)
    lens = Lens(model, example=inputs)
    plain = record(model, lens.anatomy, inputs)
    with seam.kernel(model, "eager"):
        eager = record(model, lens.anatomy, inputs)
    varied = ("input_ids", "pixel_values", "input_features")
    others = {n: v.flip(-1) if n in varied and name != "llava" else v for n, v in inputs.items()}
    if name in ("llava", "mllama"):  # image tokens stay where they are
        others = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    return Subject(lens, inputs, plain, eager, others, record(model, lens.anatomy, others))


def output(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All that the model returns, caches left out."""
    with torch.no_grad():
        found = model(**inputs)
    return [value for key, value in found.items() if isinstance(value, Tensor)] or tensors(found)


# weights, the sink's share -> weights of all rows as edited
Formula = Callable[[Tensor, Tensor], Tensor]


def chosen(size: int, places: list[int] | slice) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[places] = True
    return mask


def even(weights: Tensor, _: Tensor) -> Tensor:
    seen = (weights > 0).to(weights.dtype)
    return seen / seen.sum(-1, keepdim=True)


def every_key(weights: Tensor, _: Tensor) -> Tensor:
    return torch.full_like(weights, 1 / weights.shape[-1])


def own(share: float) -> Formula:
    return lambda weights, _: (
        (1 - share) * weights + share * torch.eye(weights.shape[-1], dtype=weights.dtype)
    )


def reweighed(factor: float) -> Formula:
    def formula(weights: Tensor, sink: Tensor) -> Tensor:
        factors = torch.ones(weights.shape[-1], dtype=weights.dtype)
        factors[chosen(weights.shape[-1], KEYS)] = factor
        new = weights * factors
        total = new.sum(-1, keepdim=True) + sink
        return torch.where(total > 0, new / total, 0)  # a row that lost all its keys

    return formula


def dropped(weights: Tensor, _: Tensor) -> Tensor:
    return weights * ~chosen(weights.shape[-1], KEYS)


CASES: dict[str, tuple[Callable[..., Edit], Formula]] = {
    "zero": (al.Zero, lambda weights, _: weights * 0),
    "scale": (lambda h, **at: al.Scale(h, -0.5, **at), lambda weights, _: weights * -0.5),
    "uniform": (al.Uniform, even),
    "identity": (al.Identity, own(1)),
    "mix": (lambda h, **at: al.Identity(h, SHARE, **at), own(SHARE)),
    "hide": (lambda h, **at: al.Hide(h, keys=KEYS, **at), reweighed(0)),
    "drop": (lambda h, **at: al.Drop(h, keys=KEYS, **at), dropped),
    "bias": (
        lambda h, **at: al.Bias(h, BIAS, keys=KEYS, **at),
        reweighed(float(torch.tensor(BIAS, dtype=torch.float64).exp())),
    ),
}


@pytest.mark.parametrize("case", CASES)
@EVERY
def test_z_and_rows_are_those_of_the_formula(name: str, case: str) -> None:
    """At the last layer of each stack, for one head, for all rows and for some."""
    at = subject(name)
    make, formula = CASES[case]
    for site in at.last:
        weights = at.eager.weights[site.name]
        assert weights is not None
        if name == "swin" and case == "uniform":  # its windows are a bias of -100: all is visible
            formula = every_key
        if site.kind == "cross" and case in ("identity", "mix"):
            continue
        sink = 1 - weights.sum(-1, keepdim=True) if site.sinks else torch.zeros(())
        value = at.eager.calls[site.name].value
        value = value.repeat_interleave(site.heads // site.groups, dim=1)
        head = site.heads - 1
        for rows in (None, ROWS):
            wanted = formula(weights, sink)
            if rows is not None:
                row = chosen(weights.shape[2], rows)[:, None]
                wanted = torch.where(row, wanted, weights)
            with at.lens.edit(make(str(site.head(head)), queries=rows)):
                found = record(at.model, at.lens.anatomy, at.inputs)
            z = found.calls[site.name].output
            # Where a model takes its softmax in float32, so do the oracle's weights and our rows.
            close = {"atol": 2e-6, "rtol": 0} if site.upcast else {"atol": 1e-12, "rtol": 1e-9}
            wanted_z = (wanted @ value)[:, head]
            torch.testing.assert_close(z[:, :, head], wanted_z, **close)
            if case not in ("zero", "scale"):  # these leave the rows as they are
                pattern = found.rows[site.name][:, head]
                torch.testing.assert_close(pattern, wanted[:, head], **close)
            assert torch.equal(z[:, :, :head], at.plain.calls[site.name].output[:, :, :head])


def test_learned_sinks_get_what_is_hidden() -> None:
    """Uniform and identity rows sum to 1; hidden weight goes to the sink, too."""
    at = subject("gpt_oss")
    before = at.plain.rows["L1"][:, 0]
    assert before.sum(-1).mean() < 0.98

    def rows(edit: Edit) -> Tensor:
        with at.lens.edit(edit):
            return record(at.model, at.lens.anatomy, at.inputs).rows["L1"][:, 0]

    for edit in (al.Uniform("L1H0"), al.Identity("L1H0")):
        torch.testing.assert_close(rows(edit).sum(-1), torch.ones(2, 16).double())
    seen = before[..., 2] > 0.01
    assert seen.any()
    assert (rows(al.Hide("L1H0", keys=2)).sum(-1) < before.sum(-1))[seen].all()
    assert (rows(al.Hide("L1H0", keys=slice(0, None))) == 0).all()


@EVERY
def test_queries_and_keys_of_another_input_give_its_pattern(name: str) -> None:
    at = subject(name)
    for site in at.last:
        spec = str(site.name)
        kept = {
            kind: {site.name: getattr(at.other.calls[site.name], part)}
            for kind, part in {"q": "query", "k": "key", "v": "value"}.items()
        }
        edits = [al.Patch(spec, kind, values) for kind, values in kept.items()]
        with at.lens.edit(*edits[:2]):
            found = record(at.model, at.lens.anatomy, at.inputs)
        assert torch.equal(found.rows[site.name], at.other.rows[site.name])
        changed = not torch.equal(found.rows[site.name], at.plain.rows[site.name])
        text_of_vlm = name in ("clip", "llava", "mllama") and site.stack != "vision"
        assert changed or text_of_vlm
        with at.lens.edit(*edits):
            z = record(at.model, at.lens.anatomy, at.inputs).calls[site.name].output
        assert torch.equal(z, at.other.calls[site.name].output)
        pattern = {site.name: at.other.rows[site.name]}
        with at.lens.edit(al.Patch(spec, "pattern", pattern), edits[2]):
            found = record(at.model, at.lens.anatomy, at.inputs)
        assert torch.equal(found.rows[site.name], at.other.rows[site.name])
        torch.testing.assert_close(found.calls[site.name].output, z, atol=1e-6, rtol=1e-6)


@EVERY
def test_z_of_all_heads_replaces_the_attention_output(name: str) -> None:
    at = subject(name)
    for site in at.last:
        if site.output is None or sum(s.module == site.module for s in at.lens.anatomy.sites) > 1:
            continue
        module = at.model.get_submodule(site.output)
        theirs: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, to=theirs: to.append(args[0]))
        output(at.model, at.other_inputs)
        handle.remove()
        handle = module.register_forward_pre_hook(lambda _, args, to=theirs: (to[0],))
        wanted = output(at.model, at.inputs)
        handle.remove()
        z = {site.name: at.other.calls[site.name].output.transpose(1, 2)}
        with at.lens.edit(al.Patch(site.name, "z", z)):
            found = output(at.model, at.inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@EVERY
def test_the_residual_stream_of_another_input_gives_its_outcome(name: str) -> None:
    """The stream that enters the last layer; of encoder-decoders, of the encoder's last layer."""
    at = subject(name)
    if name in ("clip", "llava", "mllama"):
        pytest.skip("two towers: what leaves one does not decide the outcome alone")
    stacks = {site.stack: site for site in at.lens.anatomy.sites}
    site = stacks.get("enc") or at.lens.anatomy.sites[-1]
    if name == "diffllama":  # a module attends twice, in one block
        site = at.lens.anatomy["L2"]
    others = at.other_inputs
    theirs = at.lens.run(others, keep="residual").residual
    mine = at.lens.run(at.inputs, keep="residual").residual
    edit = al.PatchStream(site.name, values=theirs)
    first = edit.sites(at.lens.anatomy)[0]
    assert not torch.equal(theirs[first], mine[first])
    with at.lens.edit(edit):
        found = output(at.model, at.inputs)
    wanted = output(at.model, others)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)
    # The stream above is the only one that was changed.
    with at.lens.edit(al.PatchStream(site.name, values=mine)):
        same = output(at.model, at.inputs)
    assert all(torch.equal(a, b) for a, b in zip(same, output(at.model, at.inputs), strict=True))


def test_sites_that_share_a_run_of_their_block_have_one_stream() -> None:
    at = subject("diffllama")
    edit = al.SteerStream("L1", vectors={"L1": torch.ones(32)})
    with pytest.raises(SeamError, match="L1 has no stream of its own"), at.lens.edit(edit):
        output(at.model, at.inputs)


def test_the_streams_of_a_shared_block_are_told_apart() -> None:
    """Albert's layers are calls of one block: each is patched alone, pass after pass."""
    at = subject("albert")
    vectors = {site.name: torch.ones(32) for site in at.lens.anatomy.sites}
    mine = at.lens.run(at.inputs, keep="residual").residual
    for _ in range(2):
        with at.lens.edit(al.SteerStream("L1", vectors=vectors, factor=2.0)):
            output(at.model, at.inputs)
            found = at.lens.run(at.inputs, keep="residual").residual
        assert torch.equal(found["L0"], mine["L0"])
        torch.testing.assert_close(found["L1"], mine["L1"] + 2)
        assert not torch.equal(found["L2"], mine["L2"])


@EVERY
def test_a_direction_is_added_to_each_block_once(name: str) -> None:
    """Every block's stream, against a plain hook on the blocks; by 0 nothing moves."""
    at = subject(name)
    blocks = {(site.block, site.call): site for site in reversed(at.lens.anatomy.sites)}
    blocks = {place: site for place, site in blocks.items() if place[0] is not None}
    if len({block for block, _ in blocks}) < len(blocks):
        pytest.skip("layers share blocks: tested alone, above")
    width = {block: 0 for block, _ in blocks}

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at_block: str) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        width[at_block] = stream.shape[-1]
        stream = stream + torch.linspace(-1, 1, stream.shape[-1], dtype=stream.dtype) / 2
        if args:
            return (stream, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": stream}

    plain = output(at.model, at.inputs)
    handles = []
    for block in width:
        module = at.model.get_submodule(block)
        hook = lambda m, a, k, b=block: add(m, a, k, b)  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    wanted = output(at.model, at.inputs)
    for handle in handles:
        handle.remove()
    vectors = {
        site.name: torch.linspace(-1, 1, width[block], dtype=torch.float64)
        for (block, _), site in blocks.items()
    }
    for factor, expected in ((0.5, wanted), (0.0, plain)):
        with at.lens.edit(al.SteerStream("all", vectors=vectors, factor=factor)):
            found = output(at.model, at.inputs)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


MLPS = {
    "gpt2": "transformer.h.1.mlp",
    "llama": "model.layers.1.mlp",
    "gemma2": "model.layers.1.post_feedforward_layernorm",
    "gpt_neox": "gpt_neox.layers.1.mlp",
    "phi3": "model.layers.1.mlp",
    "mixtral": "model.layers.1.mlp",
    "gpt_oss": "model.layers.1.mlp",
    "opt": "model.decoder.layers.1.fc2",
    "bart": "model.decoder.layers.1.fc2",
    "t5": "decoder.block.1.layer.2.DenseReluDense",
    "vit": "layers.1.mlp",
}


@pytest.mark.parametrize("name", MLPS)
def test_the_mlp_of_another_input_is_what_a_hook_puts_there(name: str) -> None:
    at = subject(name)
    module = at.model.get_submodule(MLPS[name])
    theirs: list[Any] = []
    handle = module.register_forward_hook(lambda _, __, out: theirs.append(out))
    output(at.model, at.other_inputs)
    handle.remove()
    handle = module.register_forward_hook(lambda *_: theirs[0])
    wanted = output(at.model, at.inputs)
    handle.remove()
    kept = theirs[0] if isinstance(theirs[0], Tensor) else theirs[0][0]
    assert not torch.equal(kept, torch.zeros_like(kept))
    site = next(s for s in at.lens.anatomy.sites if s.block and MLPS[name].startswith(s.block))
    values = {site.name: kept.reshape(*at.plain.calls[site.name].output.shape[:2], -1)}
    with at.lens.edit(al.PatchStream(site.name, stream="mlp", values=values)):
        found = output(at.model, at.inputs)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)
    assert not torch.equal(found[0], output(at.model, at.inputs)[0])


def test_the_mlps_of_a_shared_block_are_told_apart() -> None:
    at = subject("albert")
    vectors = {site.name: torch.ones(32) for site in at.lens.anatomy.sites}
    mine = at.lens.run(at.inputs, keep="residual").residual
    with at.lens.edit(al.SteerStream("L1", stream="mlp", vectors=vectors)):
        found = at.lens.run(at.inputs, keep="residual").residual
    assert torch.equal(found["L1"], mine["L1"])
    assert not torch.equal(found["L2"], mine["L2"])
