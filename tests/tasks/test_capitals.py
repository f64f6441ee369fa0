"""Capitals: a country of equal length in tokens stands in the corrupt prompt."""

from collections import Counter

from attnlens.tasks import capitals
from attnlens.tasks.capitals import CAPITALS, TEMPLATES
from tests.tasks import models
from tests.tasks.models import first_of, ids_of


def read(text):
    """The template of a prompt, and the country in it."""
    for template in TEMPLATES:
        before, after = template.split("{}")
        if text.startswith(before) and text.endswith(after):
            return template, text[len(before) : len(text) - len(after)]
    raise AssertionError(text)


def test_every_country_and_every_capital_is_named_once():
    for names in zip(*CAPITALS, strict=True):
        assert max(Counter(names).values()) == 1
        assert all(name.isalpha() and name[0].isupper() for name in names)


def test_answers_are_the_capitals_of_the_two_countries(any_model):
    facts = dict(CAPITALS)
    task = capitals(any_model, prompts=40)
    for i, text in enumerate(task.texts):
        template, country = read(text)
        assert int(task.answers[i, 0]) == first_of(any_model, text, facts[country])
        own = task.corrupt[i][task.mask[i]].tolist()
        (other,) = [name for name in facts if ids_of(any_model, template.format(name)) == own]
        assert int(task.wrong[i, 0]) == first_of(any_model, text, facts[other])


def test_the_span_is_the_country(any_model):
    task = capitals(any_model, prompts=20)
    assert task.spans is not None
    for ids, span, text in zip(task.clean, task.spans, task.texts, strict=True):
        said = any_model.tokenizer.decode(ids[slice(*span)]).replace(" ", "")
        assert said.lower() == read(text)[1].lower()


def test_capitals_of_one_token_are_preferred():
    """France, Italy and their capitals are tokens, the rest is letters: only those are asked."""
    known = ["France", "Paris", "Italy", "Rome", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    model = models.of_words([f" {word}" for word in known] * 20)
    asked = {read(text)[1] for text in capitals(model, prompts=30).texts}
    assert asked == {"France", "Italy"}
