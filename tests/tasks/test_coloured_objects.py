"""Coloured objects: the answer is the colour of the object that is asked for."""

import re

import pytest

from attnlens.errors import TaskError
from attnlens.tasks import coloured_objects
from tests.tasks import models
from tests.tasks.models import first_of, ids_of


@pytest.mark.parametrize("objects", [2, 3])
def test_the_answer_is_the_colour_that_was_listed(any_model, objects):
    task = coloured_objects(any_model, prompts=20, objects=objects)
    places = set()
    for i, text in enumerate(task.texts):
        listed, asked = text.split(". ")
        colours = {thing: colour for colour, thing in re.findall(r"\ba (\w+) (\w+)", listed)}
        assert len(colours) == len(set(colours.values())) == objects
        thing = asked.split()[-2]
        assert int(task.answers[i, 0]) == first_of(any_model, text, colours[thing])
        own = task.corrupt[i][task.mask[i]].tolist()
        twins = {name: f"{listed}. The colour of the {name} is" for name in colours}
        (other,) = [name for name, twin in twins.items() if ids_of(any_model, twin) == own]
        assert int(task.wrong[i, 0]) == first_of(any_model, text, colours[other])
        # the source is the colour in the list, whose first token is the answer
        first, last = task.spans[i].tolist()
        said = any_model.tokenizer.decode(task.clean[i, first:last]).replace(" ", "")
        assert said == colours[thing]
        assert task.clean[i, first] == task.answers[i, 0]
        places.add(list(colours).index(thing))
    assert places == set(range(objects))


@pytest.mark.parametrize("objects", [1, 99])
def test_it_refuses(objects):
    with pytest.raises(TaskError, match=r"objects=1; at least 2|needs 99 words"):
        coloured_objects(models.gpt2_like(), objects=objects)
