"""Round robins by weight, over one cycle."""

from __future__ import annotations


def interleaved(weights: list[int]) -> list[int]:
    return [i for round_ in range(max(weights)) for i, w in enumerate(weights) if w > round_]


def smooth(weights: list[int]) -> list[int]:
    """As nginx says it: everybody gains his weight, the richest pays everybody's."""
    credit, out = [0] * len(weights), []
    for _ in range(sum(weights)):
        credit = [c + w for c, w in zip(credit, weights, strict=True)]
        best = credit.index(max(credit))
        credit[best] -= sum(weights)
        out.append(best)
    return out
