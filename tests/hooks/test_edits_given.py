"""What edits are given is read and printed as people write; what means nothing is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attnlens as al
from attnlens.anatomy import Head
from attnlens.errors import HeadError, InputError
from attnlens.hooks.edits import Edit
from tests.architectures import ARCHITECTURES
from tests.hooks.editing import IDS, lens, logits


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            al.Zero("L3H5", queries=slice(0, 5), phase="decode"),
            "Zero of L3H5 at queries 0:5 in decode",
        ),
        (al.Zero(["L3H5", (4, 0)]), "Zero of L3H5,L4H0"),
        (al.Zero((4, 0)), "Zero of L4H0"),
        (al.Zero("all", queries=-1), "Zero of all at queries -1"),
        (al.Scale("L3", 2), "Scale 2 of L3"),
        (al.Mean("L3", {}), "Mean of L3"),
        (al.Uniform("cross.L1H2"), "Uniform of cross.L1H2"),
        (al.Identity("L0", 0.25), "Identity 0.25 of L0"),
        (al.Bias("L0H1", 0.5, keys=0), "Bias 0.5 of L0H1 at keys 0"),
        (
            al.Hide("L0", keys=slice(None, -1, 2), queries=[3, 4]),
            "Hide of L0 at queries [3, 4] at keys :-1:2",
        ),
        (al.Drop("L0", keys=torch.ones(7).bool()), "Drop of L0 at keys of a mask [7]"),
        (al.Patch("L0H1", "q", {}), "Patch q of L0H1"),
        (al.Patch("L0H1", "k", {}), "Patch k of L0H1 and all heads that share it"),
        (al.Steer("L0H1", "z", {}, 2.0, phase="prefill"), "Steer z 2 of L0H1 in prefill"),
        (al.PatchStream(3, values={}), "PatchStream of residual L3"),
        (al.SteerStream([0, 3], stream="mlp", vectors={}), "SteerStream 1 of mlp L0,L3"),
        (al.Zero(np.array([4, 0])), "Zero of L4H0"),  # type: ignore[arg-type]
        (al.Zero(np.argwhere(np.eye(2))), "Zero of L0H0,L1H1"),  # type: ignore[arg-type]
        (al.Zero(torch.eye(2).nonzero()), "Zero of L0H0,L1H1"),
        (al.Zero([(0, 1), [Head("enc", 2, 3), "L4"]]), "Zero of L0H1,enc.L2H3,L4"),  # type: ignore[list-item]
        (al.Zero((f"L{n}" for n in (1, 2)), queries=range(2)), "Zero of L1,L2 at queries [0, 1]"),
        (al.PatchStream(np.int64(3), values={}), "PatchStream of residual L3"),  # type: ignore[arg-type]
        (al.Scale("L3", np.float32(0.5)), "Scale 0.5 of L3"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_edits_read_as_people_write(edit: Edit, text: str) -> None:
    assert str(edit) == text


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: al.Patch("L0", "w", {}), "There is no 'w'; choose q, k, v, z, pattern"),
        (lambda: al.Patch("L0", "k", {}, queries=3), "k has no queries: choose its positions as"),
        (lambda: al.Patch("L0", "z", {}, keys=3), "z has no keys: choose its positions as queries"),
        (lambda: al.Steer("L0", "q", {}, keys=3), "q has no keys"),
        (lambda: al.Steer("L0", "pattern", {}), "A pattern has no direction"),
        (lambda: al.Identity("L0", 1.5), "share=1.5 is no share"),
        (lambda: al.PatchStream("L0", stream="mpl", values={}), "no stream 'mpl'; choose residual"),
        (lambda: al.Zero([]), r"\[\] names no heads: write"),
        (lambda: al.Zero(None), "None names no heads"),
        (lambda: al.Zero(3), "3 names no heads"),
        (lambda: al.Zero((True, False)), "True names no heads"),
        (lambda: al.PatchStream([], values={}), r"\[\] names no heads"),
        (lambda: al.PatchStream(1.5, values={}), "1.5 names no heads"),
        (lambda: al.Scale("L0", "2"), "factor='2' is no number"),
        (lambda: al.Scale("L0", None), "factor=None is no number"),
        (lambda: al.Bias("L0", torch.ones(3), keys=0), "value=tensor.*is no number"),
        (lambda: al.Identity("L0", True), "share=True is no number"),
        (lambda: al.Steer("L0", "q", {}, "1"), "factor='1' is no number"),
        (lambda: al.SteerStream("L0", vectors={}, factor=1j), "factor=1j is no number"),
        (lambda: al.Mean("L0", torch.ones(4, 8)), "means is of type Tensor: give tensors by site"),
        (lambda: al.Mean("L0", {"L0": 0.0}), r"means\['L0'\] is of type float"),
        (lambda: al.Patch("L0", "z", {0: torch.ones(1)}), r"values\[0\] is of type Tensor: give"),
        (lambda: al.Steer("L0", "z", {"L0": np.ones(8)}), r"vectors\['L0'\] is of type ndarray"),
        (lambda: al.PatchStream(1, values=None), "values is of type NoneType"),
        (lambda: al.SteerStream(1, vectors=[torch.ones(32)]), "vectors is of type list"),
    ],
)  # fmt: skip
def test_edits_that_mean_nothing_are_refused(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (al.Patch("L0", "q", {}), r"no q for L0; the edit covers nothing.*keep='q'"),
        (al.Patch("L0", "k", {"L0": torch.ones(1, 4, 12, 8)}), r"must be \[any, 2, any, 8\]"),
        (al.Steer("L0", "z", {"L0": torch.ones(4, 7)}), r"has shape \[4, 7\]; it must be \[4, 8\]"),
        (al.Mean("L0", {"L0": torch.ones(4, 9)}), r"mean z for L0 has shape \[4, 9\]; it must be"),
        (al.SteerStream("L0", vectors={"L0": torch.ones(7)}), r"it must be \[32\]"),
        (al.Patch("L0", "z", {"L0": torch.ones(1, 4, 9, 8)}), "covers 9 positions and the"),
        (al.Patch("L0", "z", {"L0": torch.ones(3, 4, 12, 8)}), "of 3 prompts and the input has 1"),
        (al.Steer("L0", "q", {"L1": torch.ones(4, 8)}), "no vector for L0; the edit covers L1"),
        (al.PatchStream("L0", values={"L0": torch.ones(1, 5, 32)}), "covers 5 positions"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_input_is_refused(edit: Edit, says: str) -> None:
    subject = lens("llama")
    with pytest.raises(InputError, match=says), subject.edit(edit):
        logits(subject)


def test_what_was_kept_of_other_layers_is_told() -> None:
    subject = lens("llama")
    kept_below = subject.run(IDS, keep="q", layers="L0").q
    says = "There is no q for L1; the edit covers L0"
    with pytest.raises(InputError, match=says), subject.edit(al.Patch("L1", "q", kept_below)):
        logits(subject)


def test_mean_without_the_site_is_refused() -> None:
    subject = lens("gpt2")
    edit = al.Mean("L1H0", {"L0": torch.zeros(4, 8)})
    with pytest.raises(InputError, match=r"no mean z for L1.*lens.mean_z"), subject.edit(edit):
        logits(subject)


def test_a_learned_factor_gets_its_gradient() -> None:
    subject, factor = lens("gpt2"), torch.tensor(0.5, requires_grad=True)
    with subject.edit(al.Scale("L0H1", factor)):  # type: ignore[arg-type]
        subject.model(input_ids=IDS).logits.sum().backward(inputs=[factor])
    assert factor.grad is not None
    assert factor.grad != 0


def test_bad_edits_are_refused() -> None:
    subject = lens("gpt2")
    for strange, kind in (("L0H1", "str"), ([al.Zero("L0")], "list"), (al.Zero, "type")):
        with pytest.raises(InputError, match=f"type {kind} is no edit"), subject.edit(strange):  # type: ignore[arg-type]
            pass
    with pytest.raises(InputError, match="No edit was given"), subject.edit():
        pass
    with pytest.raises(HeadError, match="L0H9"), subject.edit(al.Zero("L0H9")):
        pass


def test_identity_is_refused_where_rows_and_keys_are_different_texts() -> None:
    subject = lens("t5")
    inputs = ARCHITECTURES["t5"].inputs(subject.model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"cross-attention.*no identity"):  # noqa: SIM117
        with subject.edit(al.Identity("cross.L0H1")):
            subject.model(**inputs)
