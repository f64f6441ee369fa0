"""How much of syntax all heads hold together: a probe that sees nothing but attention weights.

Clark et al. 2019, What does BERT look at? An analysis of BERT's attention, section 5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.analyses.per_head import head_frame
from attnlens.analyses.syntax import DIRECTIONS, Direction
from attnlens.analyses.uncertainty import Interval, bootstrap_ratio, check_bootstrap
from attnlens.analyses.words import (
    KeyPieces,
    Progress,
    WordMap,
    WordTokens,
    arcs_of,
    batch_of,
    check_key_pieces,
    measure_words,
    read_sentences,
    text_sites,
)
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import BudgetError, InputError
from attnlens.lens import Lens
from attnlens.lens.asked import parse_bytes
from attnlens.tasks import Sentence

METHODS = ("attention probe", "best head", "best offset", "previous word")


@dataclass(frozen=True)
class ProbeSettings:
    """What changes the answer.

    Attributes:
        layers: the layers whose heads the probe sees; all where None.
        train: share of the sentences that it learns from, drawn at random; it is graded on the
            others.
        penalty: added to the loss, times the sum of squared weights; it makes the optimum unique.
        steps: most steps of the optimiser (LBFGS).
        key_pieces: weights to the pieces of a word are summed ("sum", the paper) or averaged.
        budget: bytes that the training sentences' maps may take.
        batch_size: sentences that run together.
        resamples, confidence, seed: of the bootstrap over sentences; the seed draws the split, too.

    Raises:
        InputError: a share of training sentences outside 0 to 1, a penalty that is negative or no
            number, no steps, key_pieces that is neither.

    """

    layers: HeadSpec | int | None = None
    train: float = 0.5
    penalty: float = 1e-5
    steps: int = 200
    key_pieces: KeyPieces = "sum"
    budget: str | int = "2GB"
    batch_size: int = 16
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_key_pieces(self.key_pieces)
        check_bootstrap(self.resamples, self.confidence)
        if not (0 < self.train < 1 and 0 <= self.penalty < math.inf and self.steps >= 1):
            raise InputError(
                f"train={self.train}, penalty={self.penalty}, steps={self.steps}: 0 < train < 1, "
                "0 <= penalty, 1 <= steps."
            )


@dataclass(frozen=True)
class AttentionProbe:
    """What the probe learned, and its score beside simpler ways to find a word's head.

    Attributes:
        heads: the heads, in the order of every `head` axis.
        to_head: `u`, nats for a unit of weight from a dependent to its head.
        to_dependent: `w`, nats for a unit of weight from a head to its dependent.
        accuracy: share of the arcs whose head is found (unlabelled attachment score), on sentences
            that nothing was learned from, one number a method of `METHODS`.
        gain: accuracy of the probe less that of each method, over the same sentences.
        best: the single head that found most heads in the training sentences.
        direction: whether that head's rows were dependents ("to_head") or heads.
        offset: the offset that most heads had there.
        loss: mean negative log-likelihood of the heads in nats, in training and in test sentences.
        train_sentences, test_sentences: numbers of sentences.
        arcs: number of arcs that are graded.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    to_head: Float[Tensor, " head"]
    to_dependent: Float[Tensor, " head"]
    accuracy: Interval
    gain: Interval
    best: Head
    direction: Direction
    offset: int
    loss: tuple[float, float]
    train_sentences: int
    test_sentences: int
    arcs: int
    settings: ProbeSettings
    notes: tuple[str, ...]

    def __getitem__(self, method: str) -> Interval:
        """Accuracy of one method and its bounds."""
        if method not in METHODS:
            raise InputError(f"There is no {method!r} here; there is {', '.join(METHODS)}.")
        return Interval(*(bound[METHODS.index(method)] for bound in self.accuracy))

    def to_frame(self) -> pd.DataFrame:
        """One row a method: its accuracy, and the probe's gain over it, with their bounds."""
        columns: dict[str, object] = {"method": METHODS}
        for name, interval in (("accuracy", self.accuracy), ("gain", self.gain)):
            for end, bound in zip(("", "_low", "_high"), interval, strict=True):
                columns[name + end] = bound.tolist()
        return pd.DataFrame(columns)

    def weights(self) -> pd.DataFrame:
        """One row a head: what the probe learned."""
        columns = {"to_head": self.to_head, "to_dependent": self.to_dependent}
        return head_frame(self.heads, columns)


def attention_probe(
    lens: Lens,
    sentences: Iterable[Sentence],
    settings: ProbeSettings | None = None,
    progress: Progress | None = None,
) -> AttentionProbe:
    """Learn to find each word's head from attention weights alone.

    `p(i | j) = softmax_i sum_k w_k W_k[i, j] + u_k W_k[j, i]` for word j and each other word i of
    its sentence, over the maps W from word to word (`analyses.words`) of all heads k; w and u are
    the likeliest, a convex problem. In two passes: the maps of the training sentences are kept (4
    bytes a head and pair of words, within `settings.budget`), those of the others are graded as
    they come. Roots have no head among the words and are not graded. Clark et al. 2019.

    Raises:
        InputError: no tokenizer with offsets, or too few sentences that fit.
        BudgetError: the maps of the training sentences are over the budget.

    """
    settings = settings or ProbeSettings()
    train, test, notes = _split(lens, sentences, settings)
    sites = text_sites(lens, batch_of(lens, [train[0].tokens])[0], settings.layers)
    heads = tuple(site.head(number) for site in sites for number in range(site.heads))
    _check_budget(train, len(heads), settings)
    total = len(train) + len(test)
    room = torch.empty(sum(tree.tokens.count**2 for tree in train), len(heads))
    learned = _learn(_maps(lens, train, settings, _part(progress, 0, total)), room, settings)
    graded = [
        _grade(tree, maps, learned)
        for tree, maps in _maps(lens, test, settings, _part(progress, len(train), total))
    ]
    hits, losses, arcs = (torch.tensor(part).double() for part in zip(*graded, strict=True))
    bootstrap = (settings.resamples, settings.confidence, settings.seed)
    direction, best = divmod(learned.single, len(heads))
    return AttentionProbe(
        heads=heads,
        to_head=learned.weights[0],
        to_dependent=learned.weights[1],
        accuracy=bootstrap_ratio(hits, arcs[:, None], *bootstrap),
        gain=bootstrap_ratio(hits[:, :1] - hits, arcs[:, None], *bootstrap),
        best=heads[best],
        direction=DIRECTIONS[direction],
        offset=learned.offset,
        loss=(learned.loss, float(losses.sum() / arcs.sum())),
        train_sentences=len(train),
        test_sentences=len(test),
        arcs=int(arcs.sum()),
        settings=settings,
        notes=(*notes, *_notes(learned)),
    )


class Choices(NamedTuple):
    """The candidates for each dependent's head, as numbers of pairs of words.

    Pair `v * n + w` of a sentence of n words is row v and column w of its map; sentences follow
    each other. Rows are as long as the longest sentence.
    """

    outward: Int[Tensor, "arc candidate"]
    """The pair from the dependent to the candidate."""
    inward: Int[Tensor, "arc candidate"]
    """The pair from the candidate to the dependent."""
    open: Bool[Tensor, "arc candidate"]
    """False for the dependent itself, words without tokens, and past the sentence's end."""
    head: Int[Tensor, " arc"]
    """Which candidate is the head."""


class _Tree(NamedTuple):
    """A sentence's tokens and its arcs, each (dependent, head)."""

    tokens: WordTokens
    arcs: tuple[tuple[int, int], ...]


class _Learned(NamedTuple):
    """What the training sentences taught."""

    weights: Float[Tensor, "direction head"]
    loss: float
    slope: float
    """Largest slope of the loss where the optimiser stopped."""
    single: int
    """Number of the best direction and head, of all directions and heads."""
    offset: int


def choices_of(trees: Sequence[tuple[WordTokens, Sequence[tuple[int, int]]]]) -> Choices:
    """The candidates for every arc of some sentences, whose maps follow each other."""
    longest = max(tokens.count for tokens, _ in trees)
    candidate = torch.arange(longest)
    rows: list[Choices] = []
    start = 0
    for tokens, arcs in trees:
        count = tokens.count
        dependent, head = torch.tensor(arcs).view(-1, 2).unbind(-1)
        real = candidate < count
        real[list(tokens.missing)] = False
        inside = candidate.clamp_max(count - 1)
        rows.append(
            Choices(
                start + dependent[:, None] * count + inside,
                start + inside * count + dependent[:, None],
                real & (candidate != dependent[:, None]),
                head,
            )
        )
        start += count * count
    return Choices(*map(torch.cat, zip(*rows, strict=True)))


def log_likelihood(
    weights: Float[Tensor, "2 head"], maps: Float[Tensor, "pair head"], choices: Choices
) -> Float[Tensor, "arc candidate"]:
    """`ln p(i | j)` of every candidate i for the head of each dependent j."""
    outward, inward = (maps @ weights.T).unbind(-1)
    scores = outward[choices.outward] + inward[choices.inward]
    return scores.masked_fill(~choices.open, -torch.inf).log_softmax(-1)


def fit(
    maps: Float[Tensor, "pair head"], choices: Choices, penalty: float, steps: int
) -> tuple[Float[Tensor, "2 head"], float, float]:
    """The likeliest weights, their loss in nats an arc, and the largest slope that is left.

    Minimises `-mean ln p(head) + penalty * sum(weights^2)`, which is convex, from 0.
    """
    weights = maps.new_zeros(2, maps.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights],
        max_iter=steps,
        tolerance_grad=1e-5,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = log_likelihood(weights, maps, choices)
        loss = -found.gather(1, choices.head[:, None]).mean()
        (loss + penalty * weights.square().sum()).backward()
        return loss.detach() + penalty * weights.detach().square().sum()

    with torch.enable_grad():
        optimiser.step(closure)
        loss = closure()
    assert weights.grad is not None
    found = weights.detach()
    plain = float(loss - penalty * found.square().sum())
    return found, plain, float(weights.grad.abs().max())


def _split(
    lens: Lens, sentences: Iterable[Sentence], settings: ProbeSettings
) -> tuple[list[_Tree], list[_Tree], tuple[str, ...]]:
    """Training and test sentences, drawn at random, and notes on those that are left out."""
    kept, tokens, notes = read_sentences(lens, sentences)
    trees = [_Tree(own, arcs_of(s, own)) for s, own in zip(kept, tokens, strict=True)]
    trees = [tree for tree in trees if tree.arcs]
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = torch.randperm(len(trees), generator=generator).tolist()
    cut = round(settings.train * len(trees))
    if not 0 < cut < len(trees):
        raise InputError(
            f"{len(trees)} sentences with arcs do not split at train={settings.train}: give more."
        )
    mixed = [trees[number] for number in order]
    return mixed[:cut], mixed[cut:], notes


def _check_budget(train: Sequence[_Tree], heads: int, settings: ProbeSettings) -> None:
    pairs = sum(tree.tokens.count**2 for tree in train)
    limit = parse_bytes(settings.budget)
    if pairs * heads * 4 > limit:
        fits = int(len(train) * limit / (pairs * heads * 4))
        raise BudgetError(
            f"The maps of {len(train)} training sentences take {pairs} pairs of words x {heads} "
            f"heads x 4 bytes = {pairs * heads * 4 / 1e9:.2f} GB, over the budget of "
            f"{limit / 1e9:.2f} GB. About {fits} of these sentences would fit: give fewer or "
            "shorter ones, a smaller share train=..., fewer layers, or budget='8GB'."
        )


def _maps(
    lens: Lens, trees: Sequence[_Tree], settings: ProbeSettings, progress: Progress | None
) -> Iterator[tuple[_Tree, Float[Tensor, "word word head"]]]:
    """Each sentence and its maps, all heads of all sites side by side."""
    reducer = partial(WordMap, key_pieces=settings.key_pieces)
    tokens = [tree.tokens for tree in trees]
    for number, found in measure_words(
        lens, tokens, reducer, settings.layers, settings.batch_size, progress
    ):
        count = tokens[number].count
        own = torch.cat([site[:, :count, :count] for site in found.values()])
        yield trees[number], own.permute(1, 2, 0).float()


def _learn(
    measured: Iterator[tuple[_Tree, Float[Tensor, "word word head"]]],
    room: Float[Tensor, "pair head"],
    settings: ProbeSettings,
) -> _Learned:
    """Fit the probe to maps, which are kept in `room`, and choose the best head and offset."""
    trees: list[_Tree] = []
    offsets: Counter[int] = Counter()
    single = torch.zeros(2 * room.shape[1])
    filled = 0
    for tree, own in measured:
        trees.append(tree)
        pairs = own.flatten(0, 1)
        room[filled : filled + len(pairs)] = pairs
        filled += len(pairs)
        offsets.update(head - dependent for dependent, head in tree.arcs)
        single = single + _single_hits(tree, own).sum(0)
    weights, loss, slope = fit(room, choices_of(trees), settings.penalty, settings.steps)
    return _Learned(weights, loss, slope, int(single.argmax()), offsets.most_common(1)[0][0])


def _single_hits(
    tree: _Tree, maps: Float[Tensor, "word word head"]
) -> Bool[Tensor, "arc direction_head"]:
    """Whether each head alone finds the head of each arc, its rows dependents, then heads."""
    dependent, head = torch.tensor(tree.arcs).unbind(-1)
    others = maps.clone()
    others.diagonal().fill_(0)
    hits: list[Tensor] = []
    for direction in (others, others.transpose(0, 1)):
        largest = direction[dependent].max(1)
        hits.append((largest.indices == head[:, None]) & (largest.values > 0))
    return torch.cat(hits, 1)


def _grade(
    tree: _Tree, maps: Float[Tensor, "word word head"], learned: _Learned
) -> tuple[list[int], float, int]:
    """Arcs of a test sentence that each method finds, the probe's loss over them, their number."""
    choices = choices_of([tree])
    found = log_likelihood(learned.weights, maps.flatten(0, 1), choices)
    offset = torch.tensor([head - dependent for dependent, head in tree.arcs])
    hits = [
        found.argmax(-1) == choices.head,
        _single_hits(tree, maps)[:, learned.single],
        offset == learned.offset,
        offset == -1,
    ]
    loss = -found.gather(1, choices.head[:, None]).sum()
    return [int(own.sum()) for own in hits], float(loss), len(tree.arcs)


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one of the two passes as progress of both."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def _notes(learned: _Learned) -> tuple[str, ...]:
    notes = ["Heads, offset and weights are learned from training sentences, graded on others."]
    if learned.slope > 1e-3:
        notes.append(
            f"The optimiser stopped at a slope of {learned.slope:.1e}: give more steps=..."
        )
    return tuple(notes)
