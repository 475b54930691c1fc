"""What the two decode kernels of latent attention have in common: whose slots are read, how, and the running softmax."""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the parameters of its kernels their types at each launch.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slots_of_program(lengths, row, split, splits, slots, BLOCK_S: tl.constexpr):
    """(first slot, slot behind the last) of one of the ranges of a row; the first is no less where nothing is left."""
    length = tl.minimum(tl.load(lengths + row).to(tl.int32), slots)
    per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_S) * BLOCK_S
    start = split * per_split
    return start, tl.minimum(start + per_split, length)


@triton.jit
def load_rows(rows, columns, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """A tile of whole rows; where nothing is padded, nothing is masked."""
    if COLUMNS == PADDED:
        tile = tl.load(rows + columns[None, :])
    else:
        tile = tl.load(rows + columns[None, :], mask=columns[None, :] < COLUMNS, other=0)
    return tile


@triton.jit
def weights_so_far(scores, numbers, end, scale_log2, largest, total):
    """(weights of a tile, what earlier sums shrink by, largest score, sum of weights), of scores before they are scaled."""
    scores = tl.where(numbers[None, :] < end, scores * scale_log2, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))  # finite: the first slot of a tile is always valid
    shrink = tl.exp2(largest - new_largest)
    weights = tl.exp2(scores - new_largest[:, None])
    return weights, shrink, new_largest, total * shrink + tl.sum(weights, 1)
