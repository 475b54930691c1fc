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


@dataclass(frozen=True)
class Parabola:
    """In x = log(rate) through three points, by Newton's divided differences."""

    x: tuple[float, float, float]  # rising
    y: tuple[float, float, float]

    @property
    def slope(self) -> float:
        return (self.y[1] - self.y[0]) / (self.x[1] - self.x[0])

    @property
    def curvature(self) -> float:
        """Not negative where the middle point is the lowest; 0 on a plateau."""
        return ((self.y[2] - self.y[1]) / (self.x[2] - self.x[1]) - self.slope) / (self.x[2] - self.x[0])

    def at(self, x: float) -> float:
        return self.y[0] + self.slope * (x - self.x[0]) + self.curvature * (x - self.x[0]) * (x - self.x[1])

    def vertex(self) -> float:
        """Of a positive curvature."""
        return (self.x[0] + self.x[1]) / 2 - self.slope / (2 * self.curvature)


def parabola(losses: Losses) -> Parabola | None:
    """Through the lowest point and its neighbours; None where it has but one, or where one of the three diverged."""
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    near = rates[best - 1 : best + 2] if best > 0 else []
    if len(near) < 3 or not all(math.isfinite(losses[rate]) for rate in near):
        return None
    low, middle, high = near
    return Parabola((math.log(low), math.log(middle), math.log(high)), (losses[low], losses[middle], losses[high]))


def optimum(losses: Losses) -> Optimum:
    """The vertex of the parabola, or the lowest point itself where there is none."""
    lowest = min(losses, key=lambda rate: losses[rate])
    curve = parabola(losses)
    if curve is None or curve.curvature <= 0:
        at_edge = lowest in (min(losses), max(losses)) or not math.isfinite(losses[lowest])
        return Optimum(as_named(lowest), losses[lowest], at_edge)
    return Optimum(as_named(math.exp(curve.vertex())), curve.at(curve.vertex()), at_edge=False)


def first_grid(base: float, factors: Sequence[float]) -> list[float]:
    """The rates every arm starts with."""
    return [as_named(base * factor) for factor in factors]


def grown_grid(grid: Sequence[float], losses: Mapping[str, Losses]) -> list[float]:
    """The grid with one more rate at each end where some arm's lowest loss lies, by the grid's own last ratio there.

    Unchanged when every arm's lowest is inside.
    """
    rates = sorted(grid)
    lowest = {min(of_arm, key=lambda rate: of_arm[rate]) for of_arm in losses.values() if of_arm}
    lower = [as_named(rates[0] * rates[0] / rates[1])] if rates[0] in lowest else []
    upper = [as_named(rates[-1] * rates[-1] / rates[-2])] if rates[-1] in lowest else []
    return [*lower, *rates, *upper]


def as_named(rate: float) -> float:
    """A rate as the names of runs have it, with three significant digits."""
    return float(f"{rate:.3g}")
