"""The learning rate of each arm: a grid of rates, equal for all arms, and a parabola in log(rate) through its lowest.

Optima differ between variants, so a comparison at one rate favours whom it was tuned on. Only validation losses are
looked at. The grid grows, for every arm alike, while the optimum of some arm lies at its edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Losses = Mapping[float, float]  # rate -> validation loss, inf where training diverged


@dataclass(frozen=True)
class Optimum:
    """What an arm's sweep says."""

    lr: float  # three significant digits
    loss: float  # of the parabola there, or measured at an edge
    at_edge: bool  # the lowest is the first or last rate: the optimum may lie beyond


def optimum(losses: Losses) -> Optimum:
    """The vertex of the parabola in log(rate) through the lowest point and its neighbours."""
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if best in (0, len(rates) - 1) or not math.isfinite(losses[rates[best]]):
        return Optimum(_rounded(rates[best]), losses[rates[best]], at_edge=True)
    if not all(math.isfinite(losses[rate]) for rate in rates[best - 1 : best + 2]):  # beside a rate that diverges
        return Optimum(_rounded(rates[best]), losses[rates[best]], at_edge=False)
    x = [math.log(rate) for rate in rates[best - 1 : best + 2]]
    y = [losses[rate] for rate in rates[best - 1 : best + 2]]
    # Newton's divided differences; the curvature is positive, since the middle is the lowest, or 0 on a plateau.
    slope = (y[1] - y[0]) / (x[1] - x[0])
    curvature = ((y[2] - y[1]) / (x[2] - x[1]) - slope) / (x[2] - x[0])
    if curvature <= 0:
        return Optimum(_rounded(rates[best]), y[1], at_edge=False)
    vertex = (x[0] + x[1]) / 2 - slope / (2 * curvature)
    loss = y[0] + slope * (vertex - x[0]) + curvature * (vertex - x[0]) * (vertex - x[1])
    return Optimum(_rounded(math.exp(vertex)), loss, at_edge=False)


def first_grid(base: float, factors: Sequence[float]) -> list[float]:
    """The rates every arm starts with."""
    return [_rounded(base * factor) for factor in factors]


def grown_grid(grid: Sequence[float], losses: Mapping[str, Losses]) -> list[float]:
    """The grid with one more rate at each end where some arm's lowest loss lies, by the grid's own last ratio there.

    Unchanged when every arm's lowest is inside.
    """
    rates = sorted(grid)
    lowest = {min(of_arm, key=lambda rate: of_arm[rate]) for of_arm in losses.values() if of_arm}
    lower = [_rounded(rates[0] * rates[0] / rates[1])] if rates[0] in lowest else []
    upper = [_rounded(rates[-1] * rates[-1] / rates[-2])] if rates[-1] in lowest else []
    return [*lower, *rates, *upper]


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
