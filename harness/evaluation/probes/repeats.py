"""What repetition in the context saves: a repeated n-gram's last token, later against the first time.

A model that can look back (an induction head: Olsson et al. 2022, arXiv 2209.11895) predicts the end of an n-gram that
already stands in its context far better than when it first came. Both losses are of the same token after the same
n - 1 tokens, in one document and one window, on natural text. Letters: B windows, T tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.evaluation.evaluate import target_nats
from harness.evaluation.perplexity import cut_windows, evenly, gather
from harness.evaluation.probes import Probe, Subject, said_of_floor
from harness.files.text import number

N_GRAM = 5  # tokens


def measure_repeats(subject: Subject, n: int = N_GRAM) -> dict[str, Any] | None:
    """Mean nats of the tokens that complete a repeated n-gram, and of the same n-grams' first occurrences.

    Windows of max_seq_len without overlap, spread evenly over the split where it is longer than max_tokens. A token
    counts once as a repeat if the n-gram that ends with it occurred before in what the window shows of the same
    document (overlapping occurrences too); it is compared with the first occurrence in there, which counts as often as
    it is repeated. first_loss, repeat_loss: means over the `count` repeats; gain: their difference, so positive where
    repetition helps; at_floor: it is within two standard errors of 0, or below; share: of all scored tokens that are
    repeats; distance: mean tokens between the two. None where nothing repeats.
    """
    length, split = subject.model.max_seq_len, subject.split
    windows = cut_windows(np.array([0, len(split.tokens)]), max_seq_len=length, stride=length)
    chosen = evenly(len(windows.start), max(1, subject.max_tokens // length))

    first_nats = repeat_nats = squared_gains = 0.0
    count = scored = distance = 0
    for begin in range(0, len(chosen), subject.batch_size):
        batch = chosen[begin : begin + subject.batch_size]
        inputs_BT, targets_BT = gather(split.tokens, windows, batch, end_of_text=subject.end_of_text)
        nats_BT = target_nats(subject.losses, inputs_BT, targets_BT, subject.through)

        # Column c of a row is the token at start + c - 1, so that the loss of column c stands in nats_BT[:, c - 1].
        tokens_BT = np.concatenate((inputs_BT[:, :1], targets_BT), axis=1)
        column = np.arange(tokens_BT.shape[1])
        place_BT = windows.start[batch, None] + column - 1
        document_BT = np.searchsorted(split.document_starts, place_BT, side="right")
        document_BT[windows.opens[batch], 0] = -1  # the end-of-text token that stands before a stream is in no document
        document_BT[column > windows.length[batch, None]] = -1
        rows, first, repeat = repeated(tokens_BT, document_BT, n)
        new = repeat > windows.skip[batch][rows]  # what the window before this one has scored counted there
        rows, first, repeat = rows[new], first[new], repeat[new]
        gains = nats_BT[rows, first - 1] - nats_BT[rows, repeat - 1]
        first_nats += float(nats_BT[rows, first - 1].sum())
        repeat_nats += float(nats_BT[rows, repeat - 1].sum())
        squared_gains += float(np.square(gains).sum())
        count += len(repeat)
        distance += int((repeat - first).sum())
        scored += int((windows.length[batch] - windows.skip[batch]).sum())
    if count == 0:
        return None
    gain = (first_nats - repeat_nats) / count
    deviation = math.sqrt(max(0.0, squared_gains / count - gain**2) / count)
    return {
        "n": n,
        "count": count,
        "share": count / scored,
        "first_loss": first_nats / count,
        "repeat_loss": repeat_nats / count,
        "gain": gain,
        "at_floor": gain <= 2 * deviation,
        "distance": distance / count,
        "scored_tokens": scored,
    }


def repeats_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """For people."""
    return [
        (
            f"repeated {figures['n']}-grams",
            f"{figures['repeat_loss']:.4f} nats, {figures['first_loss']:.4f} where they came first: "
            f"{number(figures['gain'], '.4f')} gained; {100 * figures['share']:.1f} % of the tokens{said_of_floor(figures)}",
        )
    ]


def repeated(
    tokens_BT: NDArray[np.int64], document_BT: NDArray[np.int64], n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(row, first, repeat), one each for every repeat: columns of the n-grams' last tokens, first below repeat.

    An n-gram lies in one row and in one document; documents below 0 are none. Column 0 is context only: it may begin an
    n-gram, and never ends one that is compared, for it has no loss (n of 1).
    """
    ends = np.arange(max(n - 1, 1), tokens_BT.shape[1])
    valid_BE = (document_BT[:, ends] == document_BT[:, ends - n + 1]) & (document_BT[:, ends] >= 0)
    row, which = np.nonzero(valid_BE)
    end = ends[which]
    grams = np.stack([row, document_BT[row, end], *(tokens_BT[row, end - back] for back in range(n))])
    order = np.lexsort(grams[::-1])  # stable: equal n-grams stay in the order of their columns
    sorted_grams, end, row = grams[:, order], end[order], row[order]
    opens = np.ones(len(order), dtype=bool)
    opens[1:] = (sorted_grams[:, 1:] != sorted_grams[:, :-1]).any(axis=0)
    first = end[opens][np.cumsum(opens) - 1]
    return row[~opens], first[~opens], end[~opens]


PROBE = Probe(
    measure_repeats,
    repeats_rows,
    "nothing repeats in this text",
    "Repeated n-grams: what the context saves the second time",
    {
        "n": "tokens in an n-gram",
        "count": "repeats",
        "share": "share of tokens that repeat",
        "first_loss": "nats, first time",
        "repeat_loss": "nats, repeated",
        "gain": "gain, nats",
        "distance": "tokens between",
        "scored_tokens": "tokens scored",
    },
)
