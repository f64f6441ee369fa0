"""Ablation with later attention held as it was: what heads do without what is made of it later."""

from __future__ import annotations

from attnlens.anatomy import HeadSpec
from attnlens.hooks.edits import Edit, Patch, Zero
from attnlens.lens.inputs import Inputs
from attnlens.lens.lens import Lens


def frozen(
    lens: Lens, heads: HeadSpec, inputs: Inputs, budget: str | int = "2GB"
) -> tuple[Edit, ...]:
    """Edits that zero heads while later attention keeps its clean weights: `z_h = 0, A_l = A_l(x)`.

    The values, the MLPs and the stream above are those of the ablated run; only which position is
    attended to is held. One clean run of `inputs` keeps q and k (after rotary embedding) at every
    site that runs after the lowest of the heads: equal q and k give equal weights, so no map is
    kept. Use the edits on the same inputs: `with lens.edit(*frozen(lens, "L0H1", text)): ...`.

    Raises:
        BudgetError: q and k of all later sites take more than `budget`.

    Olsson et al. 2022, In-context Learning and Induction Heads (pattern-preserving ablation).

    """
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    named = {head.site for head in anatomy.find(heads)}
    names = [site.name for site in anatomy.sites]
    zero, later = Zero(heads), ",".join(names[min(map(names.index, named)) + 1 :])
    if not later:
        return (zero,)
    clean = lens.run(inputs, keep=("q", "k"), layers=later, budget=budget)
    return (zero, Patch(later, "q", clean.q), Patch(later, "k", clean.k))
