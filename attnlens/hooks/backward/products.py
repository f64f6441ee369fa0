"""Products of values that both depend on the input, which share relevance; and attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnlens.hooks.backward.asked import Asked, depends
from attnlens.hooks.backward.tally import alias, on_gradient, scaled


def product(asked: Asked) -> Any:
    """Each of n factors that depend on the input gets 1/n."""
    given = asked.args if len(asked.args) > 1 else [*asked.args, *asked.kwargs.values()]
    lists = [each if isinstance(each, (list, tuple)) else [each] for each in given]
    count = sum(depends(factor) for factors in lists for factor in factors)
    found = asked.plain()
    return scaled(found, 1 / count) if count > 1 else found


def quotient(asked: Asked) -> Any:
    """What divides is a statistic."""
    over, by = asked.argument(0, "input"), asked.argument(1, "other")
    rest = {name: v for name, v in asked.kwargs.items() if name not in ("input", "other")}
    return asked.function(over, by.detach() if depends(by) else by, **rest)


def softmax(asked: Asked) -> Any:
    """Plain with its remainder counted, or a constant."""
    if not asked.rule.through_patterns:
        return asked.constant()
    scores = alias(asked.argument(0, "input"))
    rest = {name: value for name, value in asked.kwargs.items() if name != "input"}
    found = asked.function(scores, *asked.args[1:], **rest)
    on_gradient(scores, asked.tally.share("softmax", scores, -1.0))
    on_gradient(found, asked.tally.share("softmax", found, 1.0))
    return found


def attention(asked: Asked) -> Any:
    """A fused kernel: half to the values, a quarter to queries and keys each."""
    names = ("query", "key", "value", "attn_mask")
    query, key, value, mask = (asked.argument(place, name) for place, name in enumerate(names))
    rest = {name: given for name, given in asked.kwargs.items() if name not in names}
    rest |= dict(zip(("dropout_p", "is_causal"), asked.args[4:], strict=False))
    if not asked.rule.through_patterns:
        query, key = query.detach(), key.detach()
        mask = mask.detach() if isinstance(mask, Tensor) else mask
    elif depends(query) or depends(key):
        return _through_pattern(asked, query, key, value, mask, rest)
    return asked.function(query, key, value, mask, **rest)


def _through_pattern(
    asked: Asked, query: Tensor, key: Tensor, value: Tensor, mask: Any, rest: dict[str, Any]
) -> Tensor:
    both = sum(map(depends, (query, key)))
    query, key = (scaled(alias(part), 1 / both) if depends(part) else part for part in (query, key))
    mask = alias(mask) if depends(mask) else mask
    found = asked.function(query, key, value, mask, **rest)
    share = 0.5 if depends(value) else 1.0
    for part, kept in ((query, -1 / both), (key, -1 / both), (mask, -1.0), (found, share)):
        if depends(part):
            on_gradient(part, asked.tally.share("softmax", part, kept))
    return scaled(found, share)


def gated(asked: Asked) -> Any:
    """`a x sigmoid(b)`: the gate is a constant."""
    x, axis = asked.argument(0, "input"), asked.argument(1, "dim")
    value, gate = x.chunk(2, -1 if axis is None else axis)
    return value * gate.detach().sigmoid()
