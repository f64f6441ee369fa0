"""Training rows for the small model: text, repeated tokens, and the text tasks.

A row is a list of token ids and, for each, the weight of predicting it. What cannot be predicted
(a random token seen for the first time) weighs nothing or little; answers weigh one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attnlens.tasks import templates, words

CONTEXT_WEIGHT = 0.1  # of a task's tokens that are not answers
Row = tuple[list[int], list[float]]
Piece = tuple[str, float]


@dataclass(frozen=True)
class Batch:
    """Right-padded ids and prediction weights, `[row, position]`; padding weighs 0."""

    ids: Tensor
    weights: Tensor


class Rows:
    """Draws training rows from one tokenizer and one text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id
        self.pad = tokenizer.pad_token_id
        special = set(tokenizer.all_special_ids)
        self.vocab = [i for i in range(len(tokenizer)) if i not in special]
        core = tokenizer.backend_tokenizer
        self.text = core.encode(text, add_special_tokens=False).ids
        sentences = text.replace("\n", " ").split(".")
        self.sentences = [s.strip() for s in sentences if 20 < len(s) < 150]
        self.encode: Callable[[str], list[int]] = lru_cache(maxsize=4096)(
            lambda piece: core.encode(piece, add_special_tokens=False).ids
        )

    def row(self, pieces: list[Piece]) -> Row:
        """Pieces of text, each with its weight, as one row without the start token."""
        ids: list[int] = []
        weights: list[float] = []
        for piece, weight in pieces:
            new = self.encode(piece)
            ids += new
            weights += [weight] * len(new)
        return ids, weights

    def prose(self, draw: random.Random, length: int) -> Row:
        at = draw.randrange(len(self.text) - length)
        return [self.bos, *self.text[at : at + length - 1]], [1.0] * length

    def repeated(self, draw: random.Random, length: int) -> Row:
        """Random tokens (now and then a piece of the text) repeated until the row is full."""
        # as many short periods as long ones: the fewer tokens, the sooner copying is learned
        longest = length // 3 if length <= 64 else min(128, length // 2)
        period = round(math.exp(draw.uniform(math.log(4), math.log(longest))))
        if draw.random() < 0.15:
            at = draw.randrange(len(self.text) - period)
            block, first = self.text[at : at + period], 0.5
        else:
            block, first = draw.sample(self.vocab, period), 0.0
        ids = [self.bos, *block * (length // period + 1)][:length]
        # the second copy's first token cannot be predicted either
        return ids, [first] * (period + 2) + [1.0] * (length - period - 2)

    def shuffled_pairs(self, draw: random.Random, length: int) -> Row:
        """A few pairs of random tokens, over and over in random order.

        The second of a pair follows from the first alone, at no fixed distance: what an induction
        head does, and a head that looks back a fixed number of tokens cannot.
        """
        count = draw.randint(2, max(3, length // 8))
        tokens = draw.sample(self.vocab, 2 * count)
        pairs = list(zip(tokens[::2], tokens[1::2], strict=True))
        ids, weights, seen = [self.bos], [0.0], set[int]()
        while len(ids) < length:
            first, second = draw.choice(pairs)
            ids += [first, second]
            weights += [0.0, float(first in seen)]
            seen.add(first)
        return ids[:length], weights[:length]

    def indirect_object(self, draw: random.Random) -> list[Piece]:
        first, second = draw.sample(words.NAMES, 2)
        giver, answer = draw.choice([(first, second), (second, first)])
        text = templates.indirect_object_text(
            draw.choice(templates.INDIRECT_OBJECT),
            first, second, giver, draw.choice(words.PLACES), draw.choice(words.OBJECTS),
        )  # fmt: skip
        return [(text, CONTEXT_WEIGHT), (" " + answer, 1.0), (".", CONTEXT_WEIGHT)]

    def key_value(self, draw: random.Random) -> list[Piece]:
        count = draw.randint(2, 12)
        keys, values = draw.sample(words.KEYS, count), draw.sample(words.VALUES, count)
        pieces = [("Pairs:", CONTEXT_WEIGHT)]
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            stop = "." if i == count - 1 else ","
            pieces += [(f" {key}", 0.0), (" is", CONTEXT_WEIGHT), (f" {value}", 0.0), (stop, 0.0)]
        lead = " Again:"
        for i in draw.sample(range(count), draw.randint(1, count)):
            pieces += [(lead, CONTEXT_WEIGHT), (f" {keys[i]}", 0.0), (" is", CONTEXT_WEIGHT)]
            pieces += [(f" {values[i]}", 1.0)]
            lead = ","
        return [*pieces, (".", CONTEXT_WEIGHT)]

    def needle(self, draw: random.Random, length: int) -> list[Piece]:
        """Filler of at most `length` tokens with the needle somewhere, question and answer last."""
        pool = words.FILLER if draw.random() < 0.6 else self.sentences
        answer = " ".join(draw.sample(words.VALUES, draw.randint(1, 5)))
        fact = templates.NEEDLE_TEXT.format(words=answer)
        ending = [(" " + templates.NEEDLE_QUESTION, CONTEXT_WEIGHT), (f" {answer}.", 1.0)]
        room = length - len(self.encode(fact)) - sum(len(self.encode(text)) for text, _ in ending)
        filler: list[str] = []
        while room > 0:
            sentence = draw.choice(pool)
            room -= len(self.encode(" " + sentence)) + 1
            filler.append(sentence)
        filler = filler[:-1]
        filler.insert(draw.randint(0, len(filler)), fact)
        return [(" ".join(filler), CONTEXT_WEIGHT), *ending]

    def packed(self, draw: random.Random, length: int) -> Row:
        """Lines of task text after each other, so that the tasks work anywhere in the context."""
        ids: list[int] = [self.bos]
        weights = [0.0]
        while len(ids) < length:
            kind = draw.random()
            if kind < 0.3:
                more = self.row(self.indirect_object(draw))
            elif kind < 0.6:
                more = self.row(self.key_value(draw))
            elif kind < 0.8:
                more = self.row(self.needle(draw, draw.randint(60, 160)))
            else:
                some, weight = self.prose(draw, 33)
                more = some[1:], weight[1:]
            ids += more[0] + self.encode("\n")
            weights += [*more[1], 0.0]
        return ids[:length], weights[:length]

    def one_needle(self, draw: random.Random, length: int) -> Row:
        ids, weights = self.row(self.needle(draw, draw.randint(length // 2, length - 2)))
        return [self.bos, *ids][:length], [0.0, *weights][:length]

    def alone(
        self, make: Callable[[random.Random], list[Piece]], draw: random.Random, count: int
    ) -> Batch:
        """Prompts of one task, each by itself right after the start token."""
        made = [self.row(make(draw)) for _ in range(count)]
        return self.pad_rows([([self.bos, *ids], [0.0, *weights]) for ids, weights in made])

    def pad_rows(self, rows: list[Row]) -> Batch:
        width = max(len(ids) for ids, _ in rows)
        ids = [ids + [self.pad] * (width - len(ids)) for ids, _ in rows]
        weights = [w + [0.0] * (width - len(w)) for _, w in rows]
        return Batch(torch.tensor(ids), torch.tensor(weights))

    def step(self, seed: int, step: int, length: int, tokens: int) -> dict[str, Batch]:
        """The batches of one step, by kind: whole rows of `length`, and task prompts alone."""
        draw = random.Random(seed * 1_000_003 + step)
        rows = max(4, tokens // length)
        if length <= 48:  # the first stage teaches induction, which all tasks build on
            text, repeats = rows // 7, rows // 3
            return {
                "text": self.pad_rows([self.prose(draw, length) for _ in range(text)]),
                "repeat": self.pad_rows([self.repeated(draw, length) for _ in range(repeats)]),
                "shuffled": self.pad_rows(
                    [self.shuffled_pairs(draw, length) for _ in range(rows - text - repeats)]
                ),
            }
        repeats = round(rows * (0.45 if step < 550 else 0.3))
        tasks = max(1, round(rows * 0.2))
        text = rows - repeats - tasks
        prompts = max(8, tokens // 200)
        long = [
            self.packed(draw, length) if draw.random() < 0.6 else self.one_needle(draw, length)
            for _ in range(tasks)
        ]
        return {
            "text": self.pad_rows([self.prose(draw, length) for _ in range(text)]),
            "repeat": self.pad_rows([self.repeated(draw, length) for _ in range(repeats)]),
            "long": self.pad_rows(long),
            "names": self.alone(self.indirect_object, draw, prompts),
            "pairs": self.alone(self.key_value, draw, prompts),
        }
