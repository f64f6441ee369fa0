"""Capitals: a country is named and its capital is due; a fact that the prompt does not hold."""

from __future__ import annotations

import random

from attnlens.errors import TaskError
from attnlens.tasks.pairs import Pair, task_of_pairs
from attnlens.tasks.prompts import check_prompts, word_ids
from attnlens.tasks.task import Task, TaskModel

NAME = "capitals"
Fact = tuple[str, str]
"""A country and its capital."""
CAPITALS: tuple[Fact, ...] = (
    ("Afghanistan", "Kabul"), ("Angola", "Luanda"), ("Australia", "Canberra"),
    ("Austria", "Vienna"), ("Bangladesh", "Dhaka"), ("Belgium", "Brussels"),
    ("Bulgaria", "Sofia"), ("Canada", "Ottawa"), ("Chile", "Santiago"), ("China", "Beijing"),
    ("Croatia", "Zagreb"), ("Cuba", "Havana"), ("Denmark", "Copenhagen"), ("Egypt", "Cairo"),
    ("England", "London"), ("Finland", "Helsinki"), ("France", "Paris"), ("Germany", "Berlin"),
    ("Ghana", "Accra"), ("Greece", "Athens"), ("Hungary", "Budapest"), ("Iran", "Tehran"),
    ("Iraq", "Baghdad"), ("Ireland", "Dublin"), ("Italy", "Rome"), ("Jamaica", "Kingston"),
    ("Japan", "Tokyo"), ("Jordan", "Amman"), ("Kenya", "Nairobi"), ("Lebanon", "Beirut"),
    ("Libya", "Tripoli"), ("Nepal", "Kathmandu"), ("Norway", "Oslo"), ("Peru", "Lima"),
    ("Philippines", "Manila"), ("Poland", "Warsaw"), ("Portugal", "Lisbon"), ("Qatar", "Doha"),
    ("Romania", "Bucharest"), ("Russia", "Moscow"), ("Scotland", "Edinburgh"),
    ("Senegal", "Dakar"), ("Serbia", "Belgrade"), ("Somalia", "Mogadishu"), ("Spain", "Madrid"),
    ("Sweden", "Stockholm"), ("Syria", "Damascus"), ("Thailand", "Bangkok"), ("Turkey", "Ankara"),
    ("Uganda", "Kampala"), ("Venezuela", "Caracas"), ("Vietnam", "Hanoi"), ("Wales", "Cardiff"),
)  # fmt: skip
TEMPLATES = (
    "The capital of {} is the city of",
    "The capital city of {} is called",
    "Whoever comes to the capital of {} is in",
)


def capitals(model: TaskModel, prompts: int = 16, seed: int = 0) -> Task:
    """Prompts such as "The capital of France is the city of" (Paris).

    The corrupt prompt names another country of equally many tokens, and `wrong` is its capital;
    `spans` is the country. Capitals of one token are used where two countries of equal length have
    such, all of them otherwise, graded on their first token. Default metric: logit difference of
    the two capitals.

    Raises:
        TaskError: no tokenizer, no two countries of equal length whose capitals begin with
            different tokens, or a prompt over the context.

    """
    check_prompts(prompts, NAME)
    others = _others(model)
    draw = random.Random(seed)
    pairs: list[Pair] = []
    for _ in range(prompts):
        country, capital = draw.choice(list(others))
        instead, wrong = draw.choice(others[country, capital])
        template = draw.choice(TEMPLATES)
        begins = template.index("{")
        pairs.append(
            Pair(
                template.format(country),
                template.format(instead),
                capital,
                wrong,
                (begins, begins + len(country)),
            )
        )
    return task_of_pairs(model, NAME, pairs)


def _others(model: TaskModel) -> dict[Fact, list[Fact]]:
    """For each usable fact those that may stand in its place."""
    ids = {fact: tuple(word_ids(model, word, NAME) for word in fact) for fact in CAPITALS}
    usable = [fact for fact in CAPITALS if all(ids[fact])]
    for facts in ([fact for fact in usable if len(ids[fact][1]) == 1], usable):
        found: dict[Fact, list[Fact]] = {}
        for one in facts:
            fit = [
                other
                for other in facts
                if len(ids[other][0]) == len(ids[one][0]) and ids[other][1][0] != ids[one][1][0]
            ]
            if fit:
                found[one] = fit
        if found:
            return found
    raise TaskError(
        f"task {NAME!r} needs two countries of equally many tokens whose capitals begin with "
        f"tokens of their own, as France (Paris) and Italy (Rome); of {len(CAPITALS)} this "
        f"tokenizer can write {len(usable)} with their capitals, and no two go together. Give "
        "facts of your own with read_task, or take another task"
    )
