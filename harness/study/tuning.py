"""The learning rate of each arm: a grid of rates, equal for all arms, and a parabola in log(rate) through its lowest.

Optima differ between variants, so a comparison at one rate favours whom it was tuned on. Only validation losses are
looked at. The grid grows, for every arm alike, while the optimum of some arm lies at its edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from numpy.polynomial import Polynomial

Losses = Mapping[float, float]  # rate -> validation loss, inf where training diverged


@dataclass(frozen=True)
class Optimum:
    """What an arm's sweep says."""

    lr: float  # three significant digits
    loss: float  # of the parabola there, or measured at an edge
    at_edge: bool  # the lowest is the first or last rate: the optimum may lie beyond


@dataclass(frozen=True)
class Parabola:
    """In x = log(rate) through three points, by Newton's divided differences.

    Not numpy.polyfit, which gives a plateau a curvature of rounding errors and says nothing of the vertex's own error.
    """

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

    def vertex_sensitivity(self) -> float:
        """Length of the gradient of the vertex by the three losses: slope and curvature are linear in them."""
        first, second, whole = self.x[1] - self.x[0], self.x[2] - self.x[1], self.x[2] - self.x[0]
        slopes = -1 / first, 1 / first, 0.0
        curvatures = 1 / (first * whole), -(1 / first + 1 / second) / whole, 1 / (second * whole)
        ratio = self.slope / self.curvature
        return math.hypot(*(ratio * c - s for s, c in zip(slopes, curvatures, strict=True))) / (2 * self.curvature)


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


@dataclass(frozen=True)
class Doubt:
    """What is not known of an arm's best rate, and the validation loss in nats per token that this may cost."""

    factor: float | None  # the rate lies between rate / factor and rate * factor in 95 % of sweeps; None: no deviation known
    noise: float | None  # expected loss above the parabola's lowest, from the rate's own error
    cubic_lr: float | None  # the best of a cubic through four rates; None: fewer that did not diverge
    shape: float | None  # the cubic at the parabola's rate, above its lowest


def doubt(losses: Losses, sigma: float | None) -> Doubt | None:
    """Of the vertex of the parabola; None where there is none.

    sigma: deviation of single runs' validation losses. The vertex x = log(rate) is a function of three losses whose errors
    are independent: its variance is sigma² times the squared length of its gradient, and the loss above the lowest is the
    curvature times the squared error of x. The cubic goes through the parabola's three points and the neighbour that is lower.
    """
    curve = parabola(losses)
    if curve is None or curve.curvature <= 0:
        return None
    factor = noise = cubic_lr = shape = None
    if sigma:
        error = sigma * curve.vertex_sensitivity()
        factor, noise = math.exp(min(1.96 * error, 50.0)), curve.curvature * error**2
    rates = sorted(rate for rate, loss in losses.items() if math.isfinite(loss))
    first = next(i for i, rate in enumerate(rates) if math.isclose(math.log(rate), curve.x[0]))
    beside = [i for i in (first - 1, first + 3) if 0 <= i < len(rates)]
    if beside:
        fourth = rates[min(beside, key=lambda i: losses[rates[i]])]
        x, y = [*curve.x, math.log(fourth)], [*curve.y, losses[fourth]]
        cubic = Polynomial.fit(x, y, 3)
        stationary = [float(root.real) for root in cubic.deriv().roots() if abs(root.imag) < 1e-12]
        lowest = min([*(root for root in stationary if min(x) <= root <= max(x)), *x], key=cubic)
        cubic_lr, shape = as_named(math.exp(lowest)), float(cubic(curve.vertex()) - cubic(lowest))
    return Doubt(factor, noise, cubic_lr, shape)


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
