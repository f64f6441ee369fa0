"""Overlap of circuits: whether shared edges help in both, whatever the metric."""

import pytest
import torch

from attnlens.analyses.circuit import Circuit
from attnlens.anatomy.network import Network, Receiver, Sender


@pytest.fixture
def network() -> Network:
    senders = Sender("embed", "embed", "embed", -1), Sender("L0H0", "head", "L0", 0)
    receivers = (
        Receiver("L0H0<v>", "v", "L0", 0, 0, ("L0H0",)),
        Receiver("logits", "logits", "logits", 1, 0, ("logits",)),
    )
    return Network(senders, receivers, torch.tensor([[True, True], [False, True]]))


@pytest.mark.parametrize(
    ("metric", "direction", "turned"),
    [
        ("logit_difference", "noise", False),
        ("loss", "noise", True),
        ("logit_difference", "denoise", True),
        ("loss", "denoise", False),
    ],
)
def test_an_edge_that_helps_in_both_has_the_same_sign(
    network: Network, metric: str, direction: str, turned: bool
) -> None:
    def circuit(score: list[float], **about: str) -> Circuit:
        chosen = torch.ones(len(network), dtype=torch.float64)
        return Circuit(
            network, network.exists, torch.tensor(score, dtype=torch.float64), chosen, about
        )

    first = circuit([-3.0, -2.0, 1.0], metric="logit_difference", direction="noise")
    other = [-1.0, 5.0, 4.0]
    second = circuit(
        [-value if turned else value for value in other], metric=metric, direction=direction
    )
    assert first.compare(second).same_sign == pytest.approx(2 / 3)
