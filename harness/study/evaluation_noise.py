"""Noise of the evaluation, given these weights: what another draw of the test text would have done to a difference.

It says nothing about other seeds, so it is never a verdict on an arm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harness.errors import UserError
from harness.study.statistics import ALPHA

FEWEST_CLUSTERS = 100  # with fewer, intervals from percentiles are too narrow
_BLOCK = 1_000_000  # resampled clusters that the bootstrap holds at a time


@dataclass(frozen=True)
class Noise:
    """What another sample of clusters of text would have done to the difference of two given sets of weights; no seeds."""

    difference: float  # a - b, bits per byte
    low: float  # 95 % interval
    high: float
    clusters: int  # with text


def bootstrap(nats_a: ArrayLike, nats_b: ArrayLike, bytes_: ArrayLike, *, draws: int = 10_000, seed: int = 0) -> Noise:
    """Noise of the evaluation, given these weights: a paired bootstrap over clusters of text.

    nats_a, nats_b, bytes_: (clusters,), the summed loss of each model and the UTF-8 bytes of each document; or of segments
    of documents, and then it is of other places in the same documents, no other text. Clusters are drawn with replacement,
    the same for both models, and each draw is a ratio of totals in bits per byte; the interval lies between the percentiles
    2.5 and 97.5 (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).

    Raises UserError for fewer than 100 clusters with text, and for figures that do not belong together.
    """
    from scipy import stats

    sizes = [np.size(numbers) for numbers in (nats_a, nats_b, bytes_)]
    if len(set(sizes)) > 1:
        raise UserError(
            f"losses of {sizes[0]} and {sizes[1]} clusters and bytes of {sizes[2]} do not belong together: "
            "evaluate both models on the same text, cut in the same way"
        )
    a_C, b_C, bytes_C = (np.ravel(np.asarray(numbers, dtype=np.float64)) for numbers in (nats_a, nats_b, bytes_))
    broken = ~(np.isfinite(a_C) & np.isfinite(b_C) & np.isfinite(bytes_C) & (bytes_C >= 0))
    if broken.any():
        raise UserError(
            f"{broken.sum()} of {sizes[0]} clusters have a loss that is not finite or a size below 0 bytes, the first "
            f"is number {broken.argmax()}: evaluate again with weights that are not broken"
        )
    clusters = int((bytes_C > 0).sum())
    if clusters < FEWEST_CLUSTERS:
        raise UserError(
            f"{clusters} clusters of text are too few for a bootstrap, which takes {FEWEST_CLUSTERS}: "
            "evaluate more documents or cut long ones into shorter segments"
        )

    def difference(nats: NDArray[np.float64], size: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        ratio: NDArray[np.float64] = nats.sum(axis) / (math.log(2) * size.sum(axis))
        return ratio

    delta_C = a_C - b_C
    interval = stats.bootstrap(
        (delta_C, bytes_C),
        difference,
        paired=True,
        vectorized=True,
        n_resamples=draws,
        method="percentile",
        confidence_level=1 - ALPHA,
        batch=max(1, _BLOCK // sizes[0]),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Noise(float(difference(delta_C, bytes_C)), float(interval.low), float(interval.high), clusters)
