"""The Lens: a model, its tokenizer and its anatomy; run, measure, edit.

`run` keeps tensors, `measure` streams statistics, `edit` intervenes. Every run leaves the model as
it was, its training mode too, and nothing is recorded for gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, HeadSpec
from attnlens.anatomy.weights import HeadWeights
from attnlens.errors import InputError
from attnlens.hooks.backward import Conservation, check_conservation
from attnlens.hooks.check import Check, check_model
from attnlens.hooks.edits import Edit, Editor, MeanZ
from attnlens.hooks.edits.means import add_longer
from attnlens.hooks.examples import example_inputs
from attnlens.hooks.find_wiring import find_wiring
from attnlens.hooks.keep import Keep, Request, check_budget, check_recording
from attnlens.hooks.measure import Measure, merge
from attnlens.hooks.mlp import Mlp, find_mlps
from attnlens.hooks.probe import evaluating, examine
from attnlens.hooks.projections import head_weights
from attnlens.hooks.reads import ReadRows, check_reads
from attnlens.hooks.reducers import Reducer
from attnlens.hooks.restart import Record, Restart
from attnlens.hooks.session import Observer, Session
from attnlens.hooks.thread import apart
from attnlens.hooks.wiring import Wiring
from attnlens.lens.asked import check_edits, check_names, check_prompts, choose, parse_bytes
from attnlens.lens.decode import Decoded, Decoder, end_ids
from attnlens.lens.examined import examined, modality
from attnlens.lens.inputs import Batch, Encoder, Inputs, split
from attnlens.lens.trace import Recorded, SiteTensors, Statistics, Trace


class Lens:
    """A pretrained transformer, opened for looking at its attention. Made by `al.load`."""

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, example: Mapping[str, Any] | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._given_example = dict(example) if example is not None else None
        self._example = self._given_example or example_inputs(model)
        self.anatomy: Anatomy = examined(model, self._example, made_up=example is None)
        self._anatomies = {modality(self._example): self.anatomy}
        self._encoder = Encoder(model, tokenizer, self.anatomy.context)
        self._editors: list[Editor] = []

    @property
    def device(self) -> torch.device:
        """Where the model's first weights are."""
        return self._encoder.device

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        if self._encoder.vocab is None:
            raise InputError(f"{self.anatomy.model} has no vocabulary.")
        return self._encoder.vocab

    @property
    def context(self) -> int | None:
        """Longest input in tokens; None where the model sets no limit."""
        return self.anatomy.context

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens (start, separator, padding, mask)."""
        return frozenset(self.tokenizer.all_special_ids if self.tokenizer is not None else ())

    @property
    def bos_id(self) -> int | None:
        """Id of the token that starts a text: the tokenizer's, else the config's."""
        if self.tokenizer is not None:
            found = self.tokenizer.bos_token_id
            return found if found is not None else self.tokenizer.cls_token_id
        config: Any = self.model.config
        found = getattr(config, "bos_token_id", None)
        return found if isinstance(found, int) and found < self.vocab_size else None

    def encode(self, inputs: Inputs) -> Batch:
        """Text, texts, ids or a processor's dictionary as a checked batch on the model's device."""
        return self._encoder.encode(inputs)

    def token_texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What token ids look like as text."""
        return self._encoder.texts_of(ids)

    def run(
        self,
        inputs: Inputs,
        keep: Sequence[str] = ("pattern", "z"),
        layers: HeadSpec | int | None = None,
        heads: HeadSpec | None = None,
        rows: int | slice | Sequence[int] | None = None,
        budget: str | float = "2GB",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Trace:
        """Run the model and keep what is asked: `q k v scores pattern z result residual mlp`.

        `layers` and `heads` are specifications (`"L3:"`, `"L3H5,L4H0"`); `rows` chooses query
        positions of each prompt (`-1` is the last real token). The request is priced first; over
        `budget` bytes it is refused with BudgetError. `dtype` and `device` are those of what is
        kept.
        """
        batch = self.encode(inputs)
        anatomy = self.anatomy_for(batch)
        keep = (keep,) if isinstance(keep, str) else tuple(keep)
        chosen = choose(anatomy, layers, heads)
        sites = tuple(site for site in anatomy.sites if site.name in chosen)
        request = Request(
            keep,
            sites,
            chosen,
            batch.rows(rows, sites),
            dtype,
            torch.device(device) if device is not None else None,
        )
        limit = parse_bytes(budget)
        element = next(self.model.parameters()).element_size()
        check_budget(request, batch.extents(anatomy), limit, anatomy, element)
        kept = Keep(anatomy, request, limit, self.mlp_names)
        with Session(self.model, anatomy, [kept]):
            output = self._forward(batch)
        return Trace(
            anatomy,
            batch.tokens,
            batch.ids,
            batch.lengths,
            chosen,
            request.rows,
            output,
            {kind: SiteTensors(tensors) for kind, tensors in kept.kept.items()},
            batch.sides,
        )

    def measure(
        self,
        inputs: Inputs,
        reducers: Reducer | Sequence[Reducer],
        layers: HeadSpec | int | None = None,
        batch_size: int = 8,
    ) -> Statistics:
        """Stream statistics of every attention row while the model runs; no map is kept.

        Prompts run `batch_size` at a time, those of similar length together. Each statistic is
        `prompt head ...` at every site of `layers` (all where not given).
        """
        reducers = tuple(reducers) if isinstance(reducers, Sequence) else (reducers,)
        check_names(reducers)
        whole = self.encode(inputs)
        anatomy = self.anatomy_for(whole)
        sites = anatomy.layers(layers)
        parts, order = split(whole, batch_size)
        results: list[dict[str, dict[str, Tensor]]] = []
        for part in parts:
            observer = Measure(sites, reducers, part.sides)
            with Session(self.model, anatomy, [observer]):
                self._forward(part, last_logits=True)
            check_prompts(observer.results, part.size)
            results.append(observer.results)
        merged = merge(results)
        back = torch.tensor(order).argsort()
        values = {
            name: SiteTensors({site: t[back.to(t.device)] for site, t in tensors.items()})
            for name, tensors in merged.items()
        }
        columns = {reducer.name: reducer.columns for reducer in reducers}
        return Statistics(anatomy, whole.tokens, whole.lengths, values, columns)

    def record(self, inputs: Inputs, budget: str | float = "2GB") -> Recorded:
        """Run the model and keep what every block and attention module returned, for `restart`.

        About `tokens x layers x (d_model + widths of q, k, v and z)` numbers; over `budget` bytes
        it is refused with BudgetError.
        """
        batch = self.encode(inputs)
        anatomy = self.anatomy_for(batch)
        element = next(self.model.parameters()).element_size()
        check_recording(anatomy, batch.extents(anatomy), parse_bytes(budget), element)
        record = Record(anatomy)
        with Session(self.model, anatomy, [record]):
            output = self._forward(batch)
        return Recorded(batch, record.recording, output)

    def restart(self, trace: Recorded, layer: int | str, *observers: Observer) -> Any:
        """The model's output, computed from a layer on: all below is what `record` kept.

        Edits of `lens.edit` at this layer and above act; `layer` is a number or a site's name.

        Raises:
            InputError: a trace that `record` did not make.
            SeamError: an edit is on below this layer.
            UnsupportedModelError: the model's layers are no stack (one block serves several).

        """
        if not isinstance(trace, Recorded):
            raise InputError(
                f"A forward goes on from what lens.record(inputs) kept, not from "
                f"{type(trace).__name__}."
            )
        anatomy = self.anatomy_for(trace.batch)
        site = anatomy[layer]
        check_edits(self._editors, anatomy, trace.recording, site)
        with Session(self.model, anatomy, [Restart(trace.recording, site), *observers]):
            return self._forward(trace.batch)

    def observe(self, batch: Batch, *observers: Observer) -> Any:
        """Run one batch with observers at the sites they ask for; returns the model's output.

        For methods that neither `run` nor `measure` serves. Logits are those of the last position.
        """
        with Session(self.model, self.anatomy_for(batch), observers):
            return self._forward(batch, last_logits=True)

    @contextmanager
    def edit(self, *edits: Edit) -> Generator[None]:
        """Change heads while the block runs, in `run`, `measure`, `logits` or the model itself.

        `with lens.edit(al.Zero("L3H5"), al.Scale("L4", 2.0)): ...`. Afterwards the model is as it
        was; a block in which an edited site never ran raises SeamError.
        """
        editor = Editor(self.anatomy, edits, self.mlp_names)
        with Session(self.model, self.anatomy, [editor]):
            self._editors.append(editor)
            try:
                yield
            finally:
                self._editors.remove(editor)

    @property
    def edited(self) -> bool:
        """Whether a block of `edit` is running."""
        return bool(self._editors)

    def mean_z(
        self, inputs: Inputs, batch_size: int = 8, by_position: bool = False
    ) -> dict[str, Float[Tensor, "*position head d_v"]]:
        """Mean of every head's z over the real positions of a reference set, for `al.Mean`.

        With `by_position` one mean for each position, counted from the first real token.
        """
        whole = self.encode(inputs)
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        anatomy = self.anatomy_for(whole)
        for part in split(whole, batch_size)[0]:
            real = {site.name: part.sides.queries(site).real for site in anatomy.sites}
            observer = MeanZ(anatomy.sites, real)
            with Session(self.model, anatomy, [observer]):
                self._forward(part, last_logits=True)
            for name, total in observer.sums.items():
                sums[name] = add_longer(sums.get(name), total)
                counts[name] = add_longer(counts.get(name), observer.counts[name])
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        if by_position:
            return {
                name: (total / counts[name][:, None, None]).to(dtype)
                for name, total in sums.items()
            }
        return {name: (total.sum(0) / counts[name].sum()).to(dtype) for name, total in sums.items()}

    def logits(
        self, inputs: Inputs, reads: Int[Tensor, "prompt read"], batch_size: int = 16
    ) -> Float[Tensor, "prompt read vocab"]:
        """Next-token logits at the given positions of each prompt, counted in the padded input.

        Raises:
            InputError: reads that are not one row a prompt, or no language-model head.

        """
        whole = self.encode(inputs)
        check_reads(reads, whole.size)
        parts, _ = split(whole, batch_size, by_length=False)
        own = reads.split([part.size for part in parts])
        return torch.cat([self.logits_at(*pair) for pair in zip(parts, own, strict=True)])

    def logits_at(
        self, batch: Batch, reads: Int[Tensor, "prompt read"], *observers: Observer
    ) -> Float[Tensor, "prompt read vocab"]:
        """Run one batch with observers; only the rows that are read are unembedded.

        Raises:
            InputError: the model has no language-model head.

        """
        anatomy = self.anatomy_for(batch)
        if anatomy.unembedding is None:
            raise InputError(
                f"{self.anatomy.model} has no logits: it has no language-model head. Load the "
                "model with its head to grade its answers."
            )
        with Session(self.model, anatomy, [*observers, ReadRows(anatomy, reads)]):
            return self._forward(batch).logits

    @cached_property
    def mlps(self) -> Mapping[str, Mlp]:
        """The MLP of each block, by the block's name; found once, by a run on the example input."""
        return find_mlps(self.model, self.anatomy, self._example)

    def mlp_names(self) -> Mapping[str, str]:
        """Name of the module that writes what a block's MLP adds to the stream, by block."""
        return {block: mlp.name for block, mlp in self.mlps.items()}

    @cached_property
    def conservation(self) -> Conservation:
        """Whether relevance is conserved without edits; found once, on the example input."""
        with apart():
            return check_conservation(self.model, self.anatomy, self._example)

    @cached_property
    def wiring(self) -> Wiring:
        """What writes to the residual stream, and what reads it; found once, on an example."""
        with apart():
            example = self._given_example or example_inputs(self.model, batch=12)
            return find_wiring(self.model, self.anatomy, self.mlps, example)

    def decode(
        self,
        inputs: Inputs,
        steps: int = 50,
        observers: Sequence[Observer] = (),
        stop: Collection[int] | None = None,
    ) -> Decoded:
        """Write up to `steps` tokens after each prompt, the likeliest each time, with a cache.

        Observers see the decoded rows alone, one query at a time over all keys so far; the prompt
        before its last token runs unseen, by the model's own kernel. An answer ends at an id of
        `stop` (the model's end tokens where not given). Edits of `lens.edit` act on both.

        Raises:
            InputError: more than tokens in the input, a prompt and answer over the context, or no
                logits.
            UnsupportedModelError: an encoder, or a cache that does not keep every key.

        """
        ends = end_ids(self.model, self.tokenizer) if stop is None else stop
        decoder = Decoder(self.model, self.anatomy)
        return decoder.decode(self.encode(inputs), steps, observers, ends)

    def weights(self, layer: int | str) -> HeadWeights:
        """W_Q, W_K, W_V and W_O of one site, head by head; found by matching, not by names."""
        site = self.anatomy[layer]
        example = self._given_example or example_inputs(self.model, batch=12)
        return head_weights(self.model, self.anatomy, site, example)

    def check(self, inputs: Inputs | None = None) -> Check:
        """The self-check: every site fires, rows are exact, patterns matter (see `hooks.check`)."""
        if inputs is None:
            return check_model(self.model, self.anatomy, self._example)
        batch = self.encode(inputs)
        return check_model(self.model, self.anatomy_for(batch), batch.inputs)

    def anatomy_for(self, batch: Batch) -> Anatomy:
        """The anatomy for inputs of this modality; a new one (images, say) is probed once."""
        key = modality(batch.inputs)
        if key not in self._anatomies:
            self._anatomies[key] = examine(self.model, batch.inputs)
        return self._anatomies[key]

    @torch.no_grad()
    def _forward(self, batch: Batch, last_logits: bool = False) -> Any:
        inputs = dict(batch.inputs)
        accepted = inspect.signature(self.model.forward).parameters
        if "logits_to_keep" in accepted and last_logits:
            inputs["logits_to_keep"] = 1
        if "use_cache" in accepted:
            inputs.setdefault("use_cache", "past_key_values" in inputs)
        with evaluating(self.model):
            return self.model(**inputs)

    def __repr__(self) -> str:
        return f"Lens({self.anatomy.model}, {len(self.anatomy.sites)} sites, {self.device})"
