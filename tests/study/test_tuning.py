"""The rate of each arm: the vertex of a parabola in log(rate), and the same rates for every arm."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.study.tuning import doubt, first_grid, grown_grid, optimum
from harness.study.tuning import parabola as fitted


def parabola(best: float, rates: list[float], *, curvature: float = 0.3) -> dict[float, float]:
    return {rate: 2.0 + curvature * math.log(rate / best) ** 2 for rate in rates}


@pytest.mark.parametrize("best", [0.0021, 0.003, 0.0035])
def test_the_vertex_of_a_true_parabola_is_found_from_any_spacing(best: float) -> None:
    for rates in ([0.001, 0.003, 0.01], [0.0005, 0.001, 0.002, 0.004, 0.008], [0.0011, 0.0029, 0.0061]):
        found = optimum(parabola(best, rates))
        assert not found.at_edge
        assert found.lr == pytest.approx(best, rel=5e-3)  # three significant digits
        assert found.loss == pytest.approx(2.0, abs=1e-4)


def test_only_the_lowest_and_its_neighbours_count() -> None:
    losses = parabola(0.003, [0.001, 0.002, 0.004, 0.008])
    assert optimum(losses | {0.064: 9.0}).lr == optimum(losses).lr


def test_an_optimum_at_the_edge_is_taken_as_measured_and_said() -> None:
    found = optimum(parabola(0.03, [0.001, 0.002, 0.004]))
    assert (found.lr, found.at_edge) == (0.004, True)


def test_beside_a_rate_that_diverged_the_lowest_itself_is_taken() -> None:
    found = optimum({0.001: 2.1, 0.002: 2.0, 0.004: math.inf})
    assert (found.lr, found.loss, found.at_edge) == (0.002, 2.0, False)


def test_the_grid_grows_for_all_arms_while_one_has_its_optimum_at_an_edge() -> None:
    grid = first_grid(0.002, [0.5, 1.0, 2.0])
    assert grid == [0.001, 0.002, 0.004]
    inside, above, below = (parabola(best, grid) for best in (0.002, 0.02, 0.0002))
    assert grown_grid(grid, {"a": inside}) == grid
    assert grown_grid(grid, {"a": inside, "b": above}) == [*grid, 0.008]
    assert grown_grid(grid, {"a": below, "b": above}) == [0.0005, *grid, 0.008]


def test_the_doubt_about_a_rate_is_what_noise_in_the_losses_does_to_it() -> None:
    random, sigma, rates = np.random.default_rng(0), 0.004, [0.001, 0.002, 0.004]
    losses = parabola(0.0023, rates)
    vertices, costs = [], []
    for _ in range(4000):
        curve = fitted({rate: loss + random.normal(0, sigma) for rate, loss in losses.items()})
        assert curve is not None
        vertices.append(curve.vertex())
        costs.append(0.3 * (curve.vertex() - math.log(0.0023)) ** 2)
    found = doubt(losses, sigma)
    assert found is not None and found.factor is not None
    assert math.log(found.factor) == pytest.approx(1.96 * np.std(vertices), rel=0.05)
    assert found.noise == pytest.approx(np.mean(costs), rel=0.1)
    assert (found.cubic_lr, found.shape) == (None, None), "three points carry no cubic"
    unknown = doubt(losses, None)
    assert unknown is not None and (unknown.factor, unknown.noise) == (None, None)


def test_a_cubic_says_what_the_parabola_through_octaves_misses() -> None:
    def loss(rate: float) -> float:
        x = math.log(rate / 0.003)
        return 2.0 + 0.3 * x**2 + 0.15 * x**3  # lowest at 0.003, within the grid

    rates = [0.00125, 0.0025, 0.005, 0.01]
    losses = {rate: loss(rate) for rate in rates}
    found, best = doubt(losses, None), optimum(losses)
    assert found is not None and found.cubic_lr == pytest.approx(0.003, rel=5e-3)
    assert best.lr < 0.0028 and found.shape == pytest.approx(loss(best.lr) - 2.0, rel=0.02)
    more = doubt(losses | {0.0006: 9.0}, None)
    assert more is not None and more.cubic_lr == found.cubic_lr, "the fourth rate is the lower neighbour"


def test_where_there_is_no_vertex_there_is_no_doubt_about_it() -> None:
    assert doubt(parabola(0.03, [0.001, 0.002, 0.004]), 0.004) is None
    assert doubt({0.001: 2.1, 0.002: 2.0, 0.004: math.inf}, 0.004) is None
    beside = doubt({0.001: 2.1, 0.002: 2.0, 0.004: 2.1, 0.008: math.inf}, 0.004)
    assert beside is not None and beside.cubic_lr is None, "what diverged is no point of a cubic"
