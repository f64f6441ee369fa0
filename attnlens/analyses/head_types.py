"""Known types of heads: previous token, duplicate token, induction, copying.

Scores are mean weights on random tokens that are said several times over, where nothing but the
repetition can be attended to. Elhage et al. 2021, A mathematical framework for transformer
circuits; Olsson et al. 2022, In-context learning and induction heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.analyses.per_head import (
    HeadTable,
    Where,
    heads_of,
    side_by_side,
    table_of,
    within_sequence,
    within_tokens,
)
from attnlens.anatomy import Head, Site
from attnlens.anatomy.placed import weight_of
from attnlens.anatomy.weights import HeadWeights, input_major
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.reducers import DuplicateMass, InductionMass, OffsetMass
from attnlens.hooks.tokens import Layout
from attnlens.lens import Inputs, Lens

REPEATS = 4
LONGEST_PERIOD = 32


@dataclass(frozen=True)
class HeadTypes(HeadTable):
    """Scores of every head; NaN where a score makes no sense, with the reason in `notes`.

    `previous_token`, `duplicate` and `induction` are mean weights between 0 and 1; `copying` lies
    between -1 and 1, comes from the weights alone and has no interval.
    """

    prompts: int
    period: int
    seed: int
    notes: tuple[str, ...]

    def of_type(self, name: str, threshold: float = 0.4) -> tuple[Head, ...]:
        """The heads whose score reaches the threshold, the highest score first."""
        score = self[name].mean
        order = score.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
        return tuple(self.heads[i] for i in order if float(score[i]) >= threshold)


def head_types(
    lens: Lens,
    texts: Inputs | None = None,
    prompts: int = 16,
    period: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> HeadTypes:
    """Score every head on random tokens repeated 4 times after the start token.

    previous token `mean_t A[t, t-1]` (on `texts` where given); duplicate token: weight on earlier
    copies of the current token; induction: weight on the tokens that follow earlier copies;
    copying: `Re sum(eig) / sum |eig|` of `W_E W_V W_O W_U`. Rows without such a key are left out.
    `period` is the number of distinct tokens, 32 or as many as the context and vocabulary allow.

    Raises:
        InputError: the period does not fit the model, or it reads no tokens.

    """
    ids = repeated_ids(lens, prompts, period, seed)
    previous = Where(OffsetMass((1,), "previous_token"), within_sequence)
    repeated = [Where(DuplicateMass(), within_tokens), Where(InductionMass(), _induces)]
    inputs = {"input_ids": ids}
    if "dec" in lens.anatomy.stacks:
        inputs["decoder_input_ids"] = ids
    measured = lens.measure(inputs, [previous, *repeated], batch_size=batch_size)
    heads = heads_of(measured)
    values = {name: side_by_side(measured, name) for name in ("duplicate", "induction")}
    # Prompts of texts and of repeated tokens are different samples, so each has its own interval.
    on = measured if texts is None else lens.measure(texts, previous, batch_size=batch_size)
    before = side_by_side(on, "previous_token")[..., 0]
    _, first = table_of({"previous_token": before}, resamples, confidence, seed)
    _, others = table_of(values, resamples, confidence, seed)
    copying, notes = copying_scores(lens, heads)
    unknown = torch.full_like(copying, torch.nan)
    columns = zip(first, others, (copying, unknown, unknown), strict=True)
    mean, low, high = (torch.cat([a, b, c[:, None]], dim=1) for a, b, c in columns)
    names = ("previous_token", *values, "copying")
    length = (ids.shape[1] - _starts(lens)) // REPEATS
    all_notes = (*_notes(lens), *notes)
    return HeadTypes(heads, names, mean, low, high, prompts, length, seed, all_notes)


def repeated_ids(
    lens: Lens, prompts: int, period: int | None, seed: int
) -> Int[Tensor, "prompt position"]:
    """Distinct random tokens, no special ones, said 4 times after the start token."""
    start = _starts(lens)
    special = lens.special_ids | ({lens.bos_id} if lens.bos_id is not None else set())
    usable = torch.tensor([i for i in range(lens.vocab_size) if i not in special])
    room = (lens.context - start) // REPEATS if lens.context is not None else LONGEST_PERIOD
    most = min(room, len(usable))
    period = min(most, LONGEST_PERIOD) if period is None else period
    if not 2 <= period <= most or prompts < 1:
        raise InputError(
            f"period={period} with {prompts} prompts does not fit: give one prompt at least, and 2 "
            f"to {most} tokens, said {REPEATS} times within a context of {lens.context}."
        )
    generator = torch.Generator().manual_seed(seed)
    rows = [
        usable[torch.randperm(len(usable), generator=generator)[:period]] for _ in range(prompts)
    ]
    ids = torch.stack(rows).repeat(1, REPEATS)
    begin = torch.full((prompts, start), lens.bos_id or 0)
    return torch.cat([begin, ids], dim=1)


def _starts(lens: Lens) -> int:
    return int(lens.bos_id is not None)


def _induces(layout: Layout) -> bool:
    """Induction finds what came next in the past: heads that see the future have no need of it."""
    return within_tokens(layout) and layout.site.causal


def copying_scores(
    lens: Lens, heads: tuple[Head, ...]
) -> tuple[Float[Tensor, " head"], tuple[str, ...]]:
    """`Re sum(eig) / sum |eig|` of each head's `W_E W_V W_O W_U`, and why some are NaN.

    The eigenvalues of that vocab x vocab matrix other than 0 are those of the d_v x d_v matrix
    `W_O W_U W_E W_V`. Gains of norms are not folded in, and biases are left out.
    """
    scores = torch.full((len(heads),), torch.nan, dtype=torch.float64)
    embedding = lens.model.get_input_embeddings()  # type: ignore[operator]
    name = lens.anatomy.unembedding
    if name is None:
        return scores, ("No copying scores: the model has no unembedding.",)
    known = isinstance(embedding, nn.Embedding)
    weight = weight_of(embedding, "weight").detach() if known else None
    unembed = input_major(lens.model.get_submodule(name)).detach()
    if weight is None or weight.shape[1] != unembed.shape[0]:
        return scores, ("No copying scores: embedding and unembedding differ in width.",)
    tokens = min(weight.shape[0], unembed.shape[1])
    # The product over the vocabulary once for all heads: the token that goes in, seen coming out.
    through = unembed[:, :tokens].double() @ weight[:tokens].double()
    notes = ["Copying scores are of W_E W_V W_O W_U as stored, without gains of norms or biases."]
    silent: list[str] = []
    for site in lens.anatomy.sites:
        own = [i for i, head in enumerate(heads) if head.site == site.name]
        if site.kind != "self" or not own:
            continue
        try:
            found = _copying(lens.weights(site.name), through, site)
        except UnsupportedModelError as error:
            notes.append(f"No copying scores for {site.name}: {error}")
            continue
        scores[own] = found.cpu()
        silent.extend(str(heads[i]) for i in own if scores[i].isnan())
    if silent:
        names = ", ".join(silent[:4]) + (", ..." if len(silent) > 4 else "")
        notes.append(f"No copying score where W_E W_V W_O W_U has no eigenvalue but 0: {names}.")
    return scores, tuple(notes)


def _copying(
    weights: HeadWeights, through: Float[Tensor, "d_model d_model"], site: Site
) -> Float[Tensor, " head"]:
    value = weights.value.detach().double().repeat_interleave(site.heads // site.groups, dim=0)
    if value.shape[1] != len(through):
        raise UnsupportedModelError(
            f"its heads read a stream of width {value.shape[1]}, embeddings have {len(through)}."
        )
    return copying_score(weights.output.detach().double() @ through @ value)


def copying_score(circuit: Float[Tensor, "*head d_v d_v"]) -> Float[Tensor, "*head"]:
    """`Re sum(eig) / sum |eig|` of each matrix; NaN for a head that writes nothing."""
    eigenvalues = torch.linalg.eigvals(circuit)
    return eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)


def _notes(lens: Lens) -> tuple[str, ...]:
    notes: list[str] = []
    if lens.bos_id is None:
        notes.append("The model has no start token, so the random tokens begin without one.")
    if any(site.kind == "encoder" for site in lens.anatomy.sites):
        notes.append(
            "Heads that see both sides have no induction score; duplicates are earlier copies."
        )
    return tuple(notes)
