"""Relevance propagation: a forward whose backward pass follows other rules, within one block."""

from attnlens.hooks.backward.relevances import Relevances, relevances
from attnlens.hooks.backward.rules import ATTNLRP, CP_LRP, Rule

__all__ = ["ATTNLRP", "CP_LRP", "Relevances", "Rule", "relevances"]
