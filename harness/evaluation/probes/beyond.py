"""Loss beyond the training length, on the same tokens at every context.

Half-windows of h = L / 2 tokens (L: max_seq_len in training). Windows of 4 L tokens start h apart, so that each target
of a stretch of text is scored in eight of them, once with each half-window of context: with 1..h tokens of it, h+1..L,
L+1..2h+L and so on. What stands in a bin of contexts is therefore the loss of the same targets in every bin, and a ratio
between two bins says what context did, not which tokens were hard. The model is causal: the first 2 L positions of a
window of 4 L are a window of 2 L. Letters: B windows, T tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.evaluation.evaluate import target_nats
from harness.evaluation.losses import TokenLosses
from harness.evaluation.probes import Probe, Subject

FACTORS = (4, 2)  # times the training length: the first for which budget and text are long enough
_STRETCHES = 8  # places in the split, at most


def measure_beyond(subject: Subject) -> dict[str, Any] | None:
    """Nats per token by context, up to four times the training length; None where the model or the text has no more.

    bins: contexts `low` .. `high`, the mean loss over `tokens` predictions, and `ratio` to the loss of the bin that ends
    at the training length (in_length_loss); every bin holds the same `targets`, each equally often. ratio_2x, ratio_4x:
    those of the contexts L+1..2L and 2L+1..4L (None: not reached). As in the plain evaluation, context crosses from one
    document into the next. At most max_tokens predictions are made.
    """
    trained = subject.model.max_seq_len
    n_tokens = len(subject.split.tokens)
    for factor in FACTORS:
        starts = window_starts(n_tokens, trained, factor, subject.max_tokens)
        if len(starts):
            break
    else:
        return None
    model = subject.longer(factor * trained)
    if model is None:
        return None

    losses = TokenLosses(model, precision=subject.precision, device=subject.device)
    block, blocks = half(trained), factor * trained // half(trained)
    rows = max(1, subject.batch_size // factor)
    nats_RB = np.empty((starts.size, blocks))  # by window and by half-window in it
    offset = np.arange(-1, factor * trained)
    for first in range(0, starts.size, rows):
        tokens_BT = subject.split.tokens[starts.ravel()[first : first + rows, None] + offset].astype(np.int64)
        nats_BT = target_nats(losses, tokens_BT[:, :-1], tokens_BT[:, 1:], subject.through)
        nats_RB[first : first + rows] = nats_BT.reshape(-1, blocks, block).sum(axis=2)

    # Only targets that every half-window of context has seen: in window w of its stretch, half-window b holds target
    # block w + b, and the blocks from `blocks - 1` to the stretch's last window are in as many windows as there are b.
    nats_SWB = nats_RB.reshape(*starts.shape, blocks)
    per_stretch = starts.shape[1]
    wanted = np.arange(blocks - 1, per_stretch)
    nats_by_block = np.array([nats_SWB[:, wanted - b, b].sum() for b in range(blocks)])
    targets = starts.shape[0] * len(wanted) * block
    bins = _bins(nats_by_block, targets, block)
    in_length = next(entry["loss"] for entry in bins if entry["high"] == trained)
    for entry in bins:
        entry["ratio"] = entry["loss"] / in_length
    ratio = {entry["high"]: entry["ratio"] for entry in bins}
    return {
        "training_length": trained,
        "longest_context": factor * trained,
        "targets": targets,
        "in_length_loss": in_length,
        "ratio_2x": ratio[2 * trained],
        "ratio_4x": ratio.get(4 * trained),
        "bins": bins,
    }


def beyond_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """For people: one row for each bin beyond the training length."""
    reference = next(entry for entry in figures["bins"] if entry["high"] == figures["training_length"])
    return [
        (
            f"loss at {entry['low']}-{entry['high']}",
            f"{entry['loss']:.4f} nats per token, {entry['ratio']:.3f} of what it is at "
            f"{reference['low']}-{reference['high']} on the same {figures['targets']:,} tokens",
        )
        for entry in figures["bins"]
        if entry["low"] > figures["training_length"]
    ]


def half(trained: int) -> int:
    """Tokens by which windows are apart: half the training length, or all of one that is odd."""
    return trained // 2 if trained % 2 == 0 else trained


def window_starts(n_tokens: int, trained: int, factor: int, max_tokens: int) -> NDArray[np.int64]:
    """First targets of windows of factor * trained, (stretches, windows): stretches spread evenly over the split.

    (0, 0) where not one half-window of targets can be scored in full. The token before each first target exists.
    """
    window, block = factor * trained, half(trained)
    blocks = window // block
    per_split = max(0, (n_tokens - 1 - window) // block + 1)  # windows in one unbroken stretch over all of it
    windows = min(max_tokens // window, per_split)
    if windows < blocks:
        return np.zeros((0, 0), dtype=np.int64)
    # The blocks - 1 windows at either end of a stretch are scored in part: few stretches, each some times as long.
    stretches = max(1, min(_STRETCHES, windows // (3 * blocks)))
    each = windows // stretches
    first = np.linspace(0, per_split - each, stretches).astype(np.int64)
    return 1 + block * (first[:, None] + np.arange(each))


def _bins(nats_by_block: NDArray[np.float64], targets: int, block: int) -> list[dict[str, Any]]:
    """The first half-window of context, then octaves of it: blocks 0, 1, 2-3, 4-7."""
    bins = []
    low, high = 0, 1
    while low < len(nats_by_block):
        nats = float(nats_by_block[low:high].sum())
        tokens = targets * (min(high, len(nats_by_block)) - low)
        bins.append({"low": low * block + 1, "high": high * block, "loss": nats / tokens, "tokens": tokens})
        low, high = high, 2 * high
    return bins


PROBE = Probe(
    measure_beyond,
    beyond_rows,
    "learned positions end at the training length, or the text is too short for twice that length",
    "Beyond the training length: the same tokens with more and more context",
    {
        "longest_context": "longest context",
        "targets": "tokens predicted",
        "in_length_loss": "nats at the training length",
        "ratio_2x": "of that, up to twice the length",
        "ratio_4x": "of that, up to four times",
    },
)
