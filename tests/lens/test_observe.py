"""A run says which positions are real, and observers of one's own see its calls."""

import torch

import attnlens as al
from attnlens.anatomy import Site
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer
from attnlens.lens import Lens
from attnlens.zoo import induction_model


class Names(Observer):
    def __init__(self, lens: Lens) -> None:
        self.sites = frozenset(site.name for site in lens.anatomy.sites)
        self.seen: list[str] = []

    def attach(self, model: torch.nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        return []

    def see(self, site: Site, call: Call) -> Call:
        self.seen.append(site.name)
        return call


def test_a_trace_knows_padding_on_the_left() -> None:
    lens = al.load(induction_model())
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 0, 4, 5], [0, 3, 4, 5, 6]])
    trace = lens.run({"input_ids": ids, "attention_mask": real}, keep="z")
    assert trace.lengths == (3, 5)
    assert torch.equal(trace.sides.text.real, real.bool())


def test_an_observer_sees_each_site_once_in_order() -> None:
    lens = al.load(induction_model())
    names = Names(lens)
    output = lens.observe(lens.encode([0, 3, 4, 3]), names)
    assert names.seen == ["L0", "L1"]
    assert output.logits.shape[0] == 1
