"""Prompts with known answers: clean and corrupt pairs, where they are graded, and a metric."""

from attnlens.tasks.agreement import agreement
from attnlens.tasks.capitals import capitals
from attnlens.tasks.coloured_objects import coloured_objects
from attnlens.tasks.conllu import Sentence, read_conllu
from attnlens.tasks.copying import copy_task
from attnlens.tasks.docstring import docstring_arguments
from attnlens.tasks.greater_than import greater_than
from attnlens.tasks.haystack import (
    Needle,
    NeedlePrompt,
    hidden_tokens,
    hide_needle,
    secret_words,
)
from attnlens.tasks.indirect_object import indirect_object
from attnlens.tasks.key_value import key_value
from attnlens.tasks.metrics import accuracy, logit_difference, loss
from attnlens.tasks.needle import needle
from attnlens.tasks.other_name import other_name
from attnlens.tasks.own import read_task
from attnlens.tasks.plain_text import plain_text
from attnlens.tasks.repeated import repeated_tokens
from attnlens.tasks.task import Task, TaskModel
from attnlens.tasks.telling import telling_word

__all__ = [
    "Needle",
    "NeedlePrompt",
    "Sentence",
    "Task",
    "TaskModel",
    "accuracy",
    "agreement",
    "capitals",
    "coloured_objects",
    "copy_task",
    "docstring_arguments",
    "greater_than",
    "hidden_tokens",
    "hide_needle",
    "indirect_object",
    "key_value",
    "logit_difference",
    "loss",
    "needle",
    "other_name",
    "plain_text",
    "read_conllu",
    "read_task",
    "repeated_tokens",
    "secret_words",
    "telling_word",
]
