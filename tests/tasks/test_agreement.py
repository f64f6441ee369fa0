"""Agreement: the attractor has the other number, and the verb is the subject's."""

import torch

from attnlens.tasks import agreement
from attnlens.tasks.agreement import ATTRACTORS, BETWEEN, SUBJECTS, VERBS
from tests.tasks import models
from tests.tasks.models import first_of, ids_of

NUMBER = {word: number for pool in (SUBJECTS, ATTRACTORS) for forms in pool
          for number, word in enumerate(forms)}  # fmt: skip


def test_the_verb_agrees_with_the_subject_alone(any_model):
    task = agreement(any_model, prompts=60)
    plurals = 0
    for i, text in enumerate(task.texts):
        the, subject, between, also, attractor = text.split()
        assert (the, also) == ("The", "the")
        assert between in BETWEEN
        assert NUMBER[attractor] == 1 - NUMBER[subject]
        answer, wrong = int(task.answers[i, 0]), int(task.wrong[i, 0])
        fitting = [
            forms
            for forms in VERBS
            if first_of(any_model, text, forms[NUMBER[subject]]) == answer
            and first_of(any_model, text, forms[1 - NUMBER[subject]]) == wrong
        ]
        assert fitting
        # the corrupt prompt has the same attractor and the subject's other form
        (forms,) = [forms for forms in SUBJECTS if subject in forms]
        other = forms[1 - NUMBER[subject]]
        own = task.corrupt[i][task.mask[i]].tolist()
        assert own == ids_of(any_model, text.replace(subject, other, 1))
        plurals += NUMBER[subject]
    assert 10 < plurals < 50


def test_nouns_of_unequal_length_are_not_paired():
    """Where a plural takes one more token than its singular, the two are never twins."""
    model = models.gpt2_like()
    said = {text.split()[1] for text in agreement(model, prompts=200).texts}
    for forms in SUBJECTS:
        one, many = (len(model.tokenizer(f"The {word}")["input_ids"]) for word in forms)
        assert (one == many) == bool(said & {*forms})


def test_the_span_is_the_subject(any_model):
    task = agreement(any_model, prompts=20)
    assert task.spans is not None
    for ids, span, text in zip(task.clean, task.spans, task.texts, strict=True):
        said = any_model.tokenizer.decode(ids[slice(*span)]).replace(" ", "")
        assert said == text.split()[1]
    assert torch.equal(task.reads[:, 0] + 1, task.mask.sum(1))
