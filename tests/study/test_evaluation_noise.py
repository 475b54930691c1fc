"""The bootstrap over clusters of text: it covers, it is paired, it takes bounded memory, and it is refused without a base."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from harness.errors import UserError
from harness.study.evaluation_noise import bootstrap


def within_binomial_error(successes: int, trials: int, probability: float) -> bool:
    return abs(successes / trials - probability) < 3 * math.sqrt(probability * (1 - probability) / trials)


Floats = NDArray[np.float64]


def clusters_of_text(random: np.random.Generator, n: int) -> tuple[Floats, Floats, Floats]:
    """(nats_a, nats_b, bytes): a needs 0.01 bits per byte less; a document is as hard for both, lengths vary widely."""
    bytes_C = np.round(random.gamma(1.5, 800, n)) + 1
    hardness_C = random.normal(1.2, 0.25, n)
    difference_C = random.normal(-0.01, 0.04, n)
    nats = [math.log(2) * bytes_C * (hardness_C + shift) for shift in (difference_C, 0.0)]
    return nats[0], nats[1], bytes_C


def test_the_bootstrap_covers_the_true_difference_of_two_models_in_95_percent_of_samples() -> None:
    random = np.random.default_rng(15)
    samples = 1000
    covered = 0
    for i in range(samples):
        noise = bootstrap(*clusters_of_text(random, 200), draws=1000, seed=i)
        covered += noise.low <= -0.01 <= noise.high
    assert within_binomial_error(covered, samples, 0.945)  # a percentile interval of 200 clusters is slightly narrow


def test_the_bootstrap_compares_ratios_of_totals_and_is_paired() -> None:
    nats_a, nats_b, bytes_C = clusters_of_text(np.random.default_rng(16), 300)
    noise = bootstrap(nats_a, nats_b, bytes_C)
    totals = [nats.sum() / math.log(2) / bytes_C.sum() for nats in (nats_a, nats_b)]
    assert noise.difference == pytest.approx(totals[0] - totals[1]) and noise.clusters == 300
    assert noise == bootstrap(nats_a, nats_b, bytes_C) != bootstrap(nats_a, nats_b, bytes_C, seed=1)

    # The linear approximation of the ratio's deviation; hardness, six times the differences, must not be in it.
    spread = (nats_a - nats_b) / math.log(2) - noise.difference * bytes_C
    expected = 2 * 1.96 * math.sqrt((spread**2).sum()) / bytes_C.sum()
    assert noise.high - noise.low == pytest.approx(expected, rel=0.05)


def test_equal_models_have_no_noise_and_clusters_without_text_do_not_count() -> None:
    nats_a, _, bytes_C = clusters_of_text(np.random.default_rng(17), 120)
    noise = bootstrap(np.append(nats_a, 0.1), np.append(nats_a, 0.1), np.append(bytes_C, 0), draws=100)
    assert (noise.difference, noise.low, noise.high, noise.clusters) == (0.0, 0.0, 0.0, 120)


def test_the_bootstrap_of_many_clusters_takes_bounded_memory() -> None:
    nats_a, nats_b, bytes_C = clusters_of_text(np.random.default_rng(18), 50_000)
    bootstrap(nats_a, nats_b, bytes_C, draws=10)  # what an import takes is not counted
    tracemalloc.start()
    try:
        bootstrap(nats_a, nats_b, bytes_C, draws=500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6  # all draws at once: 600 MB


@pytest.mark.parametrize(
    ("nats_a", "nats_b", "bytes_", "sentence"),
    [
        (
            [1.0] * 63,
            [1.0] * 63,
            [4] * 63,
            "63 clusters of text are too few for a bootstrap, which takes 100: "
            "evaluate more documents or cut long ones into shorter segments",
        ),
        ([1.0] * 120, [1.0] * 120, [4] * 99 + [0] * 21, "99 clusters of text are too few"),
        (
            [1.0] * 120,
            [1.0] * 119,
            [4] * 120,
            "losses of 120 and 119 clusters and bytes of 120 do not belong together: "
            "evaluate both models on the same text, cut in the same way",
        ),
        (
            [1.0] * 118 + [math.nan, 1.0],
            [1.0] * 120,
            [4] * 119 + [-1],
            "2 of 120 clusters have a loss that is not finite or a size below 0 bytes, the first is number 118",
        ),
    ],
)
def test_a_bootstrap_without_a_base_is_refused(
    nats_a: list[float], nats_b: list[float], bytes_: list[int], sentence: str
) -> None:
    with pytest.raises(UserError) as refused:
        bootstrap(nats_a, nats_b, bytes_)
    assert str(refused.value).startswith(sentence)
