"""Segments of a split: cut at documents, and nothing of the split's totals is lost or counted twice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.data import Tokenizer
from harness.evaluation.perplexity import Scoring, Segments, SplitResult, evaluate_split
from tests.evaluation.test_perplexity import Split, texts_of

CPU = torch.device("cpu")
TEXTS = ["one two three " * 30, "Äpfel, très \N{SNOWMAN}\N{SNOWMAN} bien " * 20, "", "x", "\N{SNOWMAN}" * 40]


def split_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Split:
    documents = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]
    return Split(
        np.array([token for document in documents for token in document], dtype=np.uint16),
        np.cumsum([0, *map(len, documents)]),
        np.array([len(text.encode()) for text in texts]),
        np.array([len(text.split()) for text in texts]),
    )


def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer.plain_bytes() if kind == "bytes" else Tokenizer.train_bpe(TEXTS[:1], 280)


def numbered(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """A loss that tells which pair of neighbours was scored, exact in float64."""
    return (inputs_BT * 512 + targets_BT).double() / 2**18


def scored(split: Split, tokenizer: Tokenizer, **changes: Any) -> tuple[SplitResult, Segments]:
    texts = texts_of(tokenizer.end_of_text, changes.pop("decode", tokenizer.decode))
    scoring = Scoring(0.5, **({"batch_size": 3, "segment_tokens": 10} | changes))
    result = evaluate_split(numbered, split, texts, scoring, max_seq_len=16, device=CPU)
    assert result.segments is not None
    return result, result.segments


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("max_tokens", [None, 1, 11, 200, 431, 433, 434])
@pytest.mark.parametrize("per_document", [False, True])
def test_the_segments_sum_to_the_splits_totals(kind: str, max_tokens: int | None, per_document: bool) -> None:
    tokenizer = tokenizer_of(kind)
    split = split_of(tokenizer, TEXTS)
    result, segments = scored(split, tokenizer, max_tokens=max_tokens, per_document=per_document)
    assert sum(segments.tokens) == result.tokens
    assert sum(segments.bytes) == result.bytes
    assert math.fsum(segments.nats) == pytest.approx(result.nats, rel=1e-12)
    assert len(segments.tokens) == len(segments.bytes) == len(segments.nats) == len(segments.documents)
    assert min(segments.tokens) >= 1 and min(segments.bytes) >= 0


def test_a_segment_holds_the_losses_and_the_bytes_of_its_own_tokens() -> None:
    """One token a byte: both can be written down. A character cut in two counts where it ends."""
    tokenizer = Tokenizer.plain_bytes()
    texts = ["0123456789abc", "ab\N{SNOWMAN}", "4567890\N{SNOWMAN}Äxyz"]
    split = split_of(tokenizer, texts)
    _, segments = scored(split, tokenizer, segment_tokens=8)
    assert segments.tokens == [8, 6, 6, 8, 8]
    assert segments.documents == [0, 0, 1, 2, 2]
    assert segments.bytes == [8, 5, 5, 7, 8]  # the snowman is cut behind its first byte
    stream = [tokenizer.end_of_text, *split.tokens.tolist()]
    pairs = [(left * 512 + right) / 2**18 for left, right in itertools.pairwise(stream)]
    bounds = np.cumsum([0, *segments.tokens])
    expected = [sum(pairs[begin:end]) for begin, end in itertools.pairwise(bounds)]
    assert segments.nats == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_no_segment_crosses_a_document_and_short_documents_are_one_each(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    split = split_of(tokenizer, TEXTS)
    _, segments = scored(split, tokenizer)
    ends = set(np.cumsum(segments.tokens).tolist())
    assert ends >= set(split.document_starts[1:].tolist())
    lengths = np.diff(split.document_starts)
    assert len(segments.tokens) == sum(-(-int(length) // 10) for length in lengths)
    assert max(segments.tokens) == 10


def test_a_tokenizer_that_does_not_give_the_text_back_still_sums_to_its_bytes() -> None:
    def shortened(ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace").replace(" ", "")

    tokenizer = Tokenizer.plain_bytes()
    split = split_of(tokenizer, ["a b c d e f g h " * 9])
    result, segments = scored(split, tokenizer, decode=shortened)
    assert sum(segments.bytes) == result.bytes == 144
    assert all(8 <= size <= 12 for size in segments.bytes[:-1])


def test_segments_do_not_depend_on_batch_size_and_are_made_on_request_only() -> None:
    tokenizer = Tokenizer.plain_bytes()
    split = split_of(tokenizer, TEXTS)
    assert scored(split, tokenizer, batch_size=1)[1] == scored(split, tokenizer, batch_size=100)[1]
    plain = evaluate_split(numbered, split, tokenizer, Scoring(0.5, batch_size=3), max_seq_len=16, device=CPU)
    assert plain.segments is None
