"""Relevance propagation: a forward whose backward pass follows other rules, within one block."""

from attnlens.hooks.backward.asked import ALPHA_ONE, ATTNLRP, CP_LRP, Rule
from attnlens.hooks.backward.conservation import Conservation, check_conservation
from attnlens.hooks.backward.relevances import Relevances, relevances
from attnlens.hooks.backward.tally import MixedPromptsError

__all__ = [
    "ALPHA_ONE",
    "ATTNLRP",
    "CP_LRP",
    "Conservation",
    "MixedPromptsError",
    "Relevances",
    "Rule",
    "check_conservation",
    "relevances",
]
