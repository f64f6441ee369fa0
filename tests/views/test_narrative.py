import math

import pandas as pd
import pytest
import torch

from attnlens.analyses.ablation import Ablation, Mode
from attnlens.analyses.ablation_groups import SetAblation
from attnlens.anatomy import Head
from attnlens.views.narrative import check_line, model_line, strongest_line, type_line
from attnlens.views.ranking import ablation_lines, together_line
from tests.views.models import hand_wired, three_stacks

HEADS = (Head("", 0, 0), Head("", 0, 1))


def _ablation(effect, metric="loss", clean=1.0) -> Ablation:
    numbers = torch.tensor(effect, dtype=torch.float64)
    clean = torch.tensor([clean, clean], dtype=torch.float64)
    return Ablation(
        task="repeated_tokens", metric=metric, mode=Mode.ZERO, heads=HEADS, clean=clean,
        ablated=clean + numbers[:, None], effect=numbers, low=numbers - 0.1, high=numbers + 0.1,
        control=torch.zeros(2), control_low=torch.zeros(2), control_high=torch.zeros(2),
        control_heads=((HEADS[1],), (HEADS[0],)), seed=0, confidence=0.95, notes=(),
    )  # fmt: skip


def _types(scores) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "head": [f"L0H{i}" for i in range(len(scores))],
            "induction": scores,
            "induction_low": scores,
            "induction_high": scores,
        }
    )


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        ([0.1, 0.83], "1 induction head: L0H1 (0.83)."),
        ([0.41, 0.83], "2 induction heads: L0H1 (0.83), L0H0 (0.41)."),
        ([0.1, 0.39], "No induction head: none scores 0.4 or more (best L0H1, 0.39)."),
        ([math.nan, 0.2], "No induction head: none scores 0.4 or more (best L0H1, 0.20)."),
        ([math.nan], "No head of this model can be asked for the induction type."),
        (
            [0.9, 0.8, 0.7, 0.6, 0.5],
            "5 induction heads: L0H0 (0.90), L0H1 (0.80), L0H2 (0.70), L0H3 (0.60) and 1 more.",
        ),
    ],
)
def test_types_are_claimed_only_over_the_threshold(scores, line):
    assert type_line(_types(scores), "induction") == line


def test_the_strongest_are_named_whatever_they_score():
    assert strongest_line(_types([0.1, math.nan, 0.05]), "induction") == (
        "L0H0 0.10 (0.10 to 0.10), L0H2 0.050 (0.050 to 0.050)."
    )


def test_a_rise_of_loss_costs_and_a_fall_of_logit_difference_too():
    lines = ablation_lines(_ablation([3.1, -2.0]), vocab=40)
    assert lines[1:] == [
        "Ablating L0H0 costs 3.10 nats of loss (3.00 to 3.20; random heads of its layer 0.000)."
    ]
    lines = ablation_lines(_ablation([3.1, -2.0], "logit_difference"), vocab=40)
    assert lines[1].startswith("Ablating L0H1 costs 2.00 logits of logit difference (1.90 to 2.10;")


def test_no_head_is_said_to_matter_where_the_interval_holds_0():
    lines = ablation_lines(_ablation([0.05, -0.05]), vocab=40)
    assert lines[-1].startswith("No single head matters there")


@pytest.mark.parametrize(
    ("metric", "clean", "solved"),
    [
        ("loss", 3.0, True),
        ("loss", 3.8, False),  # ln 40 = 3.69
        ("logit_difference", 0.5, True),
        ("logit_difference", -0.5, False),
        ("accuracy", 0.0, False),
    ],
)
def test_a_task_that_the_model_does_not_solve_is_said_to_say_little(metric, clean, solved):
    lines = ablation_lines(_ablation([1.0, 0.0], metric, clean), vocab=40)
    assert ("guessing" in lines[1]) != solved


def test_together_keeps_the_signs_of_its_interval():
    result = SetAblation(
        "indirect_object", "logit_difference", Mode.MEAN, HEADS, torch.ones(2), torch.ones(2),
        effect=0.5, low=-0.4, high=1.5, control=torch.tensor([-0.2]), control_sets=(HEADS,),
        seed=0, confidence=0.95, notes=(),
    )  # fmt: skip
    assert together_line(result) == (
        "Ablating the 2 induction heads together gains 0.50 logits of logit difference "
        "(−0.40 to 1.50; random sets of as many heads in the same layers −0.20)."
    )


def test_models_are_described_stack_by_stack():
    assert model_line(hand_wired().anatomy).startswith(
        "GPT2LMHeadModel: 2 layers of 4 heads, width 128, vocabulary 32, context 32"
    )
    line = model_line(three_stacks().anatomy)
    assert "enc: 2 layers of 3 heads" in line
    assert "cross: 2 layers of 3 heads" in line


def test_the_check_is_reported_as_it_is():
    assert check_line(hand_wired().check()).startswith("Self-check passed: at all 2 sites")
