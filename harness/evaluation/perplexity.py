"""Perplexity of a whole token split: every token predicted exactly once, in strided windows, one division at the end.

The stream is cut into windows of max_seq_len inputs that start `stride` tokens apart. The first window of a stream
scores all its targets, each later one only those that no earlier window has scored, so that they see a long context;
the last window is moved back to end with the stream. A stream's first token is predicted from the end-of-text token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.config.schema import MOST_FIGURE
from harness.data.prepared import TokenSplit, VerifiedSplit
from harness.data.tokenizer import Tokenizer, text_before
from harness.errors import UserError
from harness.evaluation.metric import Scores

Integers = NDArray[np.int64]

SEGMENT_TOKENS = 2048
_CUT_CONTEXT = 32  # tokens, more than one character ever has
_MOST_NATS = math.floor(math.log(MOST_FIGURE))  # whose exponential a record holds


@dataclass(frozen=True)
class Scoring:
    """How a split is cut into windows, and what is scored of it. No choice of batch_size changes a figure."""

    stride_fraction: float  # of the window: how far apart windows start, to the nearest token; 1: each on its own
    batch_size: int  # windows per call
    per_document: bool = False  # every document is a stream of its own, no context crosses
    max_tokens: int | None = None  # only the split's first tokens
    segment_tokens: int | None = None  # keep the result's segments too, that long but for the last of each document
    progress: bool = False  # a bar for people

    def stride(self, max_seq_len: int) -> int:
        """In tokens. Raises UserError for an impossible one."""
        if not 0 < self.stride_fraction <= 1:
            raise UserError(f"stride_fraction={self.stride_fraction} must be above 0 and at most 1 (a window)")
        return max(1, round(self.stride_fraction * max_seq_len))


@dataclass(frozen=True)
class Segments:
    """A split cut into pieces of text, in order: what a bootstrap draws from. Tokens, nats and bytes sum to the split's.

    No segment crosses from one document into the next; nats and tokens count end-of-text targets, bytes do not.
    """

    tokens: list[int]
    nats: list[float]
    bytes: list[int]  # UTF-8; a character cut in two belongs where it ends
    documents: list[int]  # which each one is cut from, by its place in the split


@dataclass(frozen=True)
class SplitResult:
    """Ratios of totals over one split. End-of-text targets count in tokens and nats, not in bytes and words."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    word_perplexity: float | None  # exp(nats per white-space word); None beyond MOST_FIGURE, as without words
    bits_per_byte: float
    tokens: int
    bytes: int  # of the text, UTF-8
    words: int
    nats: float
    loss_by_position: list[tuple[int, int, float]]  # (from, to, loss): nats per token with from..to tokens of context
    segments: Segments | None = None  # where they were asked for
    beside: tuple[SplitResult, ...] = ()  # of what else was measured of every target, in its words

    def scores(self) -> Scores:
        """As they stand in a record: what Scores names is a field here, or worked out from those."""
        return cast(Scores, {key: getattr(self, key) for key in Scores.__annotations__})


@dataclass(frozen=True)
class Windows:
    """Window w reads the targets start[w] .. start[w] + length[w] - 1 and scores those from start[w] + skip[w] on."""

    start: Integers
    length: Integers
    skip: Integers
    opens: NDArray[np.bool_]  # begins its stream: the end-of-text token stands before it


@dataclass(frozen=True)
class Share:
    """The part of a split that one of several processes scores: every `of`-th batch, from number `rank` on."""

    rank: int
    of: int
    total: Callable[[NDArray[np.float64]], NDArray[np.float64]]  # sums over the processes


WHOLE = Share(0, 1, lambda values: values)


@torch.no_grad()  # and not inference_mode, whose tensors would spoil what a model caches for training
def evaluate_split(
    token_losses: Callable[[Tensor, Tensor], Tensor],
    split: VerifiedSplit,
    texts: Tokenizer,
    scoring: Scoring,
    *,
    max_seq_len: int,
    device: torch.device,
    share: Share = WHOLE,
) -> SplitResult:
    """Score a split with token_losses(inputs_BT, targets_BT) -> nats_BT; the caller puts the model into eval mode.

    Or nats_KBT, several quantities in nats of every target: the result is the first one's, the others' are `beside` it.
    With scoring.max_tokens the text of a document cut in two is asked of `texts`. loss_by_position counts every prediction
    that was made, those of the overlaps too, by its number of context tokens in the window. share: of the batches; every
    process gets the whole result and calls token_losses as often as the others (a sharded model needs them all). Raises
    UserError on an impossible stride, a part without text, or a model whose loss is not finite.
    """
    n_tokens = len(split.tokens) if scoring.max_tokens is None else min(scoring.max_tokens, len(split.tokens))
    if n_tokens < 1:
        raise UserError(f"nothing to evaluate: {n_tokens} of the split's {len(split.tokens)} tokens are asked for")
    bounds = np.array([0, n_tokens])
    if scoring.per_document:
        bounds = np.append(split.document_starts[split.document_starts < n_tokens], n_tokens)
    windows = cut_windows(bounds, max_seq_len=max_seq_len, stride=scoring.stride(max_seq_len))

    tallies: list[_Tally] = []
    by_length = np.argsort(-windows.length, kind="stable")  # windows of one length together: hardly any padding
    batches = [by_length[i : i + scoring.batch_size] for i in range(0, len(by_length), scoring.batch_size)]
    rounds = -(-len(batches) // share.of)
    for turn in _bar(range(rounds), scoring.progress):
        number = turn * share.of + share.rank
        batch = batches[number % len(batches)]
        inputs_BT, targets_BT = gather(split.tokens, windows, batch, end_of_text=texts.end_of_text)
        losses = token_losses(torch.from_numpy(inputs_BT).to(device), torch.from_numpy(targets_BT).to(device))
        losses_KBT = losses.reshape(-1, *inputs_BT.shape).cpu().double().numpy()  # not every device knows float64
        tallies = tallies or [_Tally(n_tokens, max_seq_len, keeps_all=scoring.segment_tokens is not None) for _ in losses_KBT]
        if number < len(batches):  # the others' company is not counted
            for tally, losses_BT in zip(tallies, losses_KBT, strict=True):
                tally.add(windows, batch, losses_BT)
    for tally in tallies:
        tally.sum_over(share)
    first, *others = (_result(tally, split, n_tokens, texts, scoring) for tally in tallies)
    return replace(first, beside=tuple(others))


def _result(tally: _Tally, split: TokenSplit, n_tokens: int, texts: Tokenizer, scoring: Scoring) -> SplitResult:
    nats, scored = tally.nats, tally.scored
    assert scored == n_tokens, f"{scored} targets were scored, the split has {n_tokens}"
    loss = nats / scored
    if not loss < _MOST_NATS:  # not a number is not below either
        raise UserError(f"the model's loss is {loss} nats a token: its weights are broken, use an earlier checkpoint")
    text_bytes, words = text_size(split, n_tokens, texts.decode)
    if text_bytes == 0:
        raise UserError(f"the first {n_tokens} tokens of the split hold no text: evaluate more of them")
    segments = None
    if tally.nats_N is not None and scoring.segment_tokens is not None:
        segments = cut_segments(split, tally.nats_N, scoring.segment_tokens, text_bytes, texts.decode)
    return SplitResult(
        loss=loss,
        perplexity=math.exp(loss),
        word_perplexity=math.exp(nats / words) if nats < _MOST_NATS * words else None,
        bits_per_byte=nats / math.log(2) / text_bytes,
        tokens=scored,
        bytes=text_bytes,
        words=words,
        nats=nats,
        loss_by_position=_by_octave(tally.nats_by_position, tally.count_by_position),
        segments=segments,
    )


class _Tally:
    """What the windows that were scored add up to; of every prediction that was made, by its number of context tokens.

    keeps_all: the nats of each of the n_tokens targets as well, nats_N.
    """

    def __init__(self, n_tokens: int, max_seq_len: int, *, keeps_all: bool) -> None:
        self.nats, self.scored = 0.0, 0
        self.nats_N = np.zeros(n_tokens) if keeps_all else None
        self.nats_by_position, self.count_by_position = np.zeros(max_seq_len), np.zeros(max_seq_len, dtype=np.int64)

    def add(self, windows: Windows, batch: Integers, nats_BT: NDArray[np.float64]) -> None:
        position_T = np.arange(nats_BT.shape[1])
        real_BT = position_T < windows.length[batch, None]
        scored_BT = real_BT & (position_T >= windows.skip[batch, None])
        self.nats += nats_BT.sum(where=scored_BT)
        self.scored += int(scored_BT.sum())
        if self.nats_N is not None:
            self.nats_N[(windows.start[batch, None] + position_T)[scored_BT]] = nats_BT[scored_BT]
        self.nats_by_position[: len(position_T)] += nats_BT.sum(axis=0, where=real_BT)
        self.count_by_position[: len(position_T)] += real_BT.sum(axis=0)

    def sum_over(self, share: Share) -> None:
        """From one process's share to the whole."""
        here = ([self.nats, self.scored], self.nats_by_position, self.count_by_position)
        (nats, scored), self.nats_by_position, counts = np.split(
            share.total(np.concatenate(here)), np.cumsum([2, len(self.nats_by_position)])
        )
        self.nats, self.scored, self.count_by_position = float(nats), int(scored), counts.astype(np.int64)  # below 2^53
        if self.nats_N is not None:
            self.nats_N = share.total(self.nats_N)


def cut_windows(bounds: Integers, *, max_seq_len: int, stride: int) -> Windows:
    """Windows over the streams bounds[i] .. bounds[i + 1]: every target is scored in exactly one."""
    begin, end = bounds[:-1], bounds[1:]
    count = 1 + -(-np.maximum(end - begin - max_seq_len, 0) // stride)
    stream = np.repeat(np.arange(len(begin)), count)
    rank = np.arange(len(stream)) - np.repeat(np.cumsum(count) - count, count)
    unmoved = begin[stream] + rank * stride
    start = np.maximum(np.minimum(unmoved, end[stream] - max_seq_len), begin[stream])
    length = np.minimum(end[stream] - start, max_seq_len)
    # The window before ends stride tokens before this one's unmoved end; what lies up to there is scored already.
    skip = np.where(rank == 0, 0, unmoved - stride + max_seq_len - start)
    return Windows(start, length, skip, rank == 0)


def evenly(count: int, most: int) -> Integers:
    """At most `most` of 0 .. count - 1, evenly spread, all of them if there are no more."""
    return np.arange(count) if count <= most else np.arange(most) * count // most


def gather(
    tokens: NDArray[np.unsignedinteger], windows: Windows, batch: Integers, *, end_of_text: int
) -> tuple[Integers, Integers]:
    """inputs_BT and targets_BT of some windows, padded on the right with end_of_text to the longest."""
    T = windows.length[batch].max()
    offset = np.arange(-1, T)
    block = tokens[(windows.start[batch, None] + offset).clip(0, len(tokens) - 1)].astype(np.int64)
    block[offset >= windows.length[batch, None]] = end_of_text
    block[windows.opens[batch], 0] = end_of_text
    return block[:, :-1], block[:, 1:]


def text_size(split: TokenSplit, n_tokens: int, decode: Callable[[Sequence[int]], str]) -> tuple[int, int]:
    """UTF-8 bytes and white-space words of the text that the first n_tokens tokens stand for.

    Whole documents by their own counts; of a document cut in two, what decode makes of its first part (a character cut
    in two counts as nothing, a word cut in two as one).
    """
    ends = split.document_starts[1:]
    whole = int(np.searchsorted(ends, n_tokens, side="right"))
    text_bytes, words = int(split.document_bytes[:whole].sum()), int(split.document_words[:whole].sum())
    if whole < len(ends):
        begin = int(split.document_starts[whole])
        text = text_before(decode, split.tokens[begin : int(ends[whole]) - 1].tolist(), n_tokens - begin)
        text_bytes, words = text_bytes + len(text.encode()), words + len(text.split())
    return text_bytes, words


def cut_segments(
    split: TokenSplit, nats_N: NDArray[np.float64], length: int, text_bytes: int, decode: Callable[[Sequence[int]], str]
) -> Segments:
    """Segments of `length` tokens, counted from each document's start, over the first len(nats_N) tokens.

    text_bytes: of those tokens (`text_size`). What a segment adds to its document's text is decoded behind a few tokens
    that come before it; where a tokenizer does not give the text back exactly, the document's true bytes are shared out
    in proportion.
    """
    n_tokens = len(nats_N)
    starts = split.document_starts
    begins: list[int] = []
    sizes: list[int] = []
    documents: list[int] = []
    left = text_bytes
    for document in range(int(np.searchsorted(starts[:-1], n_tokens))):
        begin, end = int(starts[document]), min(int(starts[document + 1]), n_tokens)
        own_bytes = int(split.document_bytes[document]) if end == starts[document + 1] else left
        left -= own_bytes
        cuts = range(begin, end, length)
        shared = [0]
        if len(cuts) > 1:
            document_N = split.tokens[begin : int(starts[document + 1]) - 1]
            added = [_text_added(document_N, cut - begin, min(cut + length, end) - begin, decode) for cut in cuts]
            *upto, decoded = itertools.accumulate(added)
            shared += [own_bytes * size // decoded if decoded else 0 for size in upto]
        sizes += np.diff([*shared, own_bytes]).tolist()
        begins += cuts
        documents += [document] * len(cuts)
    tokens, nats = np.diff([*begins, n_tokens]).tolist(), np.add.reduceat(nats_N, begins).tolist()
    return Segments(tokens=tokens, nats=nats, bytes=sizes, documents=documents)


def _text_added(document_N: NDArray[np.unsignedinteger], begin: int, end: int, decode: Callable[[Sequence[int]], str]) -> int:
    """UTF-8 bytes by which a document's tokens begin .. end - 1 lengthen its text."""
    first = max(0, begin - _CUT_CONTEXT)
    near = document_N[first : end + _CUT_CONTEXT].tolist()
    before, after = (len(text_before(decode, near, stop - first).encode()) for stop in (begin, end))
    return max(0, after - before)


def _by_octave(nats: NDArray[np.float64], count: Integers) -> list[tuple[int, int, float]]:
    """Mean nats with 1, 2-3, 4-7, ... tokens of context; position p of a window sees p + 1 tokens."""
    octaves = []
    low = 1
    while low <= len(count) and count[low - 1] > 0:
        high = min(2 * low - 1, int(np.count_nonzero(count)))
        part = slice(low - 1, high)
        octaves.append((low, high, float(nats[part].sum() / count[part].sum())))
        low *= 2
    return octaves


def _bar(rounds: range, progress: bool) -> Iterable[int]:
    if not progress:
        return rounds
    from tqdm import tqdm

    bar: Iterable[int] = tqdm(rounds, desc="evaluate", unit="batch", leave=False, disable=None)
    return bar
