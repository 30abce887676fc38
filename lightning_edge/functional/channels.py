"""Which units (channels, attention heads) of which group go: scores compared, widths rounded, budgets met."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Cost = Callable[[Sequence[int]], float]


def units_to_keep(
    scores: Sequence[Tensor],
    *,
    cost: Cost,
    budget: float,
    scope: str = "global",
    steps: Sequence[int],
    gone: Sequence[int] | None = None,
) -> list[Tensor]:
    """Return masks over the units of each group, True = stays, whose cost is within the budget.

    Units go in steps that keep every width a multiple of ``steps``, cheapest step first: those of the smallest mean
    score, each group's scores divided by their mean (scope "global"), or those of the smallest share of a group, so
    that all groups shrink alike (scope "layer"). A group never loses its last step. Greedy, and nested: a smaller
    budget takes the same units and more.

    Args:
        scores: For each group, the importance of its units, at least 0, shape (units,).
        cost: Function from the units that stay in each group to the cost.
        budget: Largest cost that is accepted.
        scope: "global" or "layer".
        steps: For each group, of which number of units its width stays a multiple.
        gone: For each group, how many units have gone before and stay so: those of the smallest scores.

    Raises:
        ValueError: If the narrowest widths cost more than the budget; says how much.

    >>> units_to_keep([torch.tensor([3.0, 1.0, 2.0])], cost=sum, budget=2, steps=[1])
    [tensor([ True, False,  True])]
    """
    order = [torch.argsort(score, stable=True) for score in scores]
    kept = [len(score) - count for score, count in zip(scores, gone or [0] * len(scores), strict=True)]
    offers: list[tuple[float, int, int]] = []  # (price, group, units that stay)
    for group, (score, ranks) in enumerate(zip(scores, order, strict=True)):
        size, step = len(score), steps[group]
        mean = float(score.double().mean()) or 1.0
        for stays in range((size - 1) // step * step, 0, -step):
            going = ranks[size - min(size, stays + step) : size - stays]
            price = 1 - stays / size if scope == "layer" else float(score[going].double().mean()) / mean
            offers.append((price, group, stays))
    for _, group, stays in sorted(offers, key=lambda offer: (offer[0], -offer[2] / len(scores[offer[1]]), offer[1])):
        if cost(kept) <= budget:
            break
        kept[group] = min(kept[group], stays)
    if cost(kept) > budget:
        raise ValueError(f"the narrowest widths cost {cost(kept):.4g}, more than {budget:.4g}")
    masks = []
    for ranks, stays in zip(order, kept, strict=True):
        mask = torch.ones(len(ranks), dtype=torch.bool)
        mask[ranks[: len(ranks) - stays].cpu()] = False
        masks.append(mask)
    return masks
