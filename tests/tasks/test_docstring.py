"""Docstrings: the next argument of the definition is due."""

import ast
import re

from attnlens.tasks import docstring_arguments
from tests.tasks.models import first_of, ids_of


def test_the_third_argument_is_due_and_the_fourth_in_the_corrupt_prompt(any_model):
    task = docstring_arguments(any_model, prompts=20)
    for i, text in enumerate(task.texts):
        (listed,) = re.findall(r"\(self, (.+)\):", text)
        first, second, third, fourth = listed.split(", ")
        assert re.findall(r":param (\w+):", text) == [first, second]
        assert int(task.answers[i, 0]) == first_of(any_model, text, third)
        assert int(task.wrong[i, 0]) == first_of(any_model, text, fourth)
        swapped = text.replace(f"{third}, {fourth}", f"{fourth}, {third}")
        own = task.corrupt[i][task.mask[i]].tolist()
        assert ids_of(any_model, swapped) == own
        begin, end = task.spans[i].tolist()
        said = any_model.tokenizer.decode(task.clean[i, begin:end]).replace(" ", "")
        assert said == third


def test_it_is_python(any_model):
    for text in docstring_arguments(any_model, prompts=5).texts:
        (function,) = ast.parse(f'{text} x: y\n    """').body
        assert isinstance(function, ast.FunctionDef)
        assert len(function.args.args) == 5
