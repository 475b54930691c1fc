"""The rate of each arm: the vertex of a parabola in log(rate), and the same rates for every arm."""

from __future__ import annotations

import math

import pytest

from harness.study.tuning import first_grid, grown_grid, optimum


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
