"""Chefer et al. 2021 and gradient rollout for one prompt, in numpy, as the papers write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

Maps = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""A and dM/dA of each site, `head query key`, in the order in which they run."""


def of_prompt(
    found: Mapping[str, tuple[Tensor, Tensor]], prompt: int, text: Tensor, decoder: Tensor
) -> Maps:
    """One prompt's maps without padding; `text` and `decoder` say which positions are real."""
    own: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, pair in found.items():
        stack = name.rpartition(".")[0]
        rows = (decoder if stack in ("dec", "cross") else text).numpy()
        keys = (decoder if stack == "dec" else text).numpy()
        own[name] = tuple(one[prompt].numpy()[:, rows][:, :, keys] for one in pair)
    return own


def averaged(weights: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """`Ā = E_h[(A * dM/dA)^+]`, head by head."""
    total = np.zeros(weights.shape[1:])
    for head in range(len(weights)):
        product = weights[head] * gradient[head]
        total += np.where(product > 0, product, 0)
    return total / len(weights)


def r_bar(relevance: np.ndarray) -> np.ndarray:
    """`R̂ = R - I`, `R̄ = R̂ / rowsum + I`, a row at a time; a row without anything stays I's."""
    identity = np.eye(len(relevance))
    found = identity.copy()
    for row, values in enumerate(relevance - identity):
        if values.sum() > 0:
            found[row] += values / values.sum()
    return found


def self_only(maps: Maps) -> np.ndarray:
    """R of a model of one stack: `R = I`, then `R = R + Ā R` at each layer."""
    relevance = None
    for weights, gradient in maps.values():
        if relevance is None:
            relevance = np.eye(weights.shape[1])
        relevance = relevance + averaged(weights, gradient) @ relevance
    assert relevance is not None
    return relevance


def encoder_decoder(maps: Maps) -> tuple[np.ndarray, np.ndarray]:
    """R_tt of the decoder's tokens and R_te of these and the encoder's."""
    text = next(w.shape[1] for name, (w, _) in maps.items() if name.startswith("enc"))
    own = next(w.shape[1] for name, (w, _) in maps.items() if name.startswith("dec"))
    r_ee, r_tt, r_te = np.eye(text), np.eye(own), np.zeros((own, text))
    for name, (weights, gradient) in maps.items():
        a = averaged(weights, gradient)
        if name.startswith("enc"):
            r_ee = r_ee + a @ r_ee
        elif name.startswith("dec"):
            r_tt, r_te = r_tt + a @ r_tt, r_te + a @ r_te
        else:
            r_te = r_te + r_bar(r_tt).T @ a @ r_bar(r_ee)
    return r_tt, r_te


def co_attention(
    layers: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """R_ss, R_sq, R_qs, R_qq of layers of Ā_sq and Ā_qs, then Ā_ss and Ā_qq of self-attention."""
    s, q = layers[0][0].shape
    ss, sq, qs, qq = np.eye(s), np.zeros((s, q)), np.zeros((q, s)), np.eye(q)
    for a_sq, a_qs, a_ss, a_qq in layers:
        sq_more, ss_more = r_bar(ss).T @ a_sq @ r_bar(qq), a_sq @ qs
        qs_more, qq_more = r_bar(qq).T @ a_qs @ r_bar(ss), a_qs @ sq
        ss, sq, qs, qq = ss + ss_more, sq + sq_more, qs + qs_more, qq + qq_more
        ss, sq = ss + a_ss @ ss, sq + a_ss @ sq
        qq, qs = qq + a_qq @ qq, qs + a_qq @ qs
    return ss, sq, qs, qq


def gradient_rollout(maps: Maps) -> np.ndarray:
    """`prod rownorm(Ā + I)` over the text's and then the decoder's positions as one sequence."""
    text = max((w.shape[2] for n, (w, _) in maps.items() if not n.startswith("dec")), default=0)
    own = max((w.shape[1] for n, (w, _) in maps.items() if n.startswith("dec")), default=0)
    found = np.eye(text + own)
    for name, (weights, gradient) in maps.items():
        step = np.eye(text + own)
        rows = slice(text, None) if name.startswith(("dec", "cross")) else slice(0, text)
        keys = slice(text, None) if name.startswith("dec") else slice(0, text)
        step[rows, keys] += averaged(weights, gradient)
        found = step / step.sum(1, keepdims=True) @ found
    return found
