"""How the text tasks read: pure functions from words to text, shared with the training script."""

from __future__ import annotations

from collections.abc import Sequence

# {first} and {second} are the two names, {giver} is one of them again; the other one is the answer.
INDIRECT_OBJECT = (
    "When {first} and {second} came to the {place}, {giver} gave the {object} to",
    "After {first} and {second} left the {place}, {giver} passed a {object} to",
    "Today {first} met {second} near the {place}, and {giver} brought a {object} to",
    "While {first} and {second} sat in the {place}, {giver} showed the {object} to",
    "At the {place}, {first} and {second} talked until {giver} threw the {object} to",
    "Before {first} and {second} reached the {place}, {giver} sold the {object} to",
    "Once {first} saw {second} at the {place}, {giver} lent a {object} to",
    "Because {first} and {second} lost the {place}, {giver} sent the {object} to",
)

NEEDLE_TEXT = "The secret words are {words}."
NEEDLE_QUESTION = "What are the secret words? The secret words are"


def indirect_object_text(
    template: str, first: str, second: str, giver: str, place: str, item: str
) -> str:
    """The sentence up to the name to be predicted."""
    return template.format(first=first, second=second, giver=giver, place=place, object=item)


def pairs_text(keys: Sequence[str], values: Sequence[str]) -> str:
    """The list of pairs that a key-value prompt opens with."""
    listed = ", ".join(f"{key} is {value}" for key, value in zip(keys, values, strict=True))
    return f"Pairs: {listed}."


def key_value_text(keys: Sequence[str], values: Sequence[str], query: str) -> str:
    """The list of pairs and the question, up to the value to be predicted."""
    return f"{pairs_text(keys, values)} Again: {query} is"


def needle_text(
    sentences: Sequence[str],
    place: int,
    words: str,
    text: str = NEEDLE_TEXT,
    question: str = NEEDLE_QUESTION,
) -> tuple[str, int]:
    """The filler with the needle before sentence `place`; the character at which `words` begin."""
    before = " ".join(sentences[:place])
    head, tail = text.split("{words}")
    lead = f"{before} {head}" if before else head
    after = " ".join([head + words + tail, *sentences[place:], question])
    return (f"{before} {after}" if before else after), len(lead)
