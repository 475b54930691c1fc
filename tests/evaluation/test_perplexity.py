"""Every token of a split is predicted exactly once, from the right context, and every metric is a ratio of totals."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.config.schema import MOST_FIGURE
from harness.config.typed import typed
from harness.errors import UserError
from harness.evaluation.evaluate import evaluate_model
from harness.evaluation.losses import TokenLosses
from harness.evaluation.perplexity import WHOLE, Scoring, Share, SplitResult, cut_windows, evaluate_split, text_size
from harness.runs.records import RunSummary
from tests.support.tiny_model import VOCAB, tiny_model

END = VOCAB - 1
CPU = torch.device("cpu")


@dataclass
class Split:
    tokens: np.ndarray
    document_starts: np.ndarray
    document_bytes: np.ndarray
    document_words: np.ndarray


def _split(lengths: Sequence[int], *, seed: int = 0) -> Split:
    """Documents of random tokens, an end-of-text token after each; a token is two bytes, three are a word."""
    random = np.random.default_rng(seed)
    documents = [np.append(random.integers(0, END, length), END) for length in lengths]
    starts = np.cumsum([0, *(len(document) for document in documents)])
    lengths_array = np.array(lengths, dtype=np.int64)
    return Split(np.concatenate(documents).astype(np.uint16), starts, 2 * lengths_array, -(-lengths_array // 3))


def _decode(ids: Sequence[int]) -> str:
    return " ".join("ab" * len(ids[i : i + 3]) for i in range(0, len(ids), 3))


def _evaluate(token_losses: Callable[[Tensor, Tensor], Tensor], split: Split, **changes: Any) -> SplitResult:
    """With `changes` of these settings or of Scoring's."""
    settings: dict[str, Any] = {"max_seq_len": 8, "stride": 4, "batch_size": 3, "decode": _decode, "share": WHOLE} | changes
    max_seq_len, stride, decode, share = (settings.pop(name) for name in ("max_seq_len", "stride", "decode", "share"))
    scoring = Scoring(stride / max_seq_len, **settings)
    texts = texts_of(END, decode)
    return evaluate_split(token_losses, split, texts, scoring, max_seq_len=max_seq_len, device=CPU, share=share)


def texts_of(end_of_text: int, decode: Callable[[Sequence[int]], str] = lambda ids: "x " * len(ids)) -> Any:
    """What is asked of a tokenizer."""
    return SimpleNamespace(end_of_text=end_of_text, begins=(), decode=decode)


def _uniform(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    return torch.full(targets_BT.shape, math.log(VOCAB), dtype=torch.float64)


def _bigram(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """A different number for every pair of neighbours, exact in float64: sums tell which pairs were scored."""
    return (inputs_BT * VOCAB + targets_BT).double() / 1000


def test_a_uniform_model_has_perplexity_exactly_the_vocabulary_size() -> None:
    split = _split([5, 30, 1, 12])
    result = _evaluate(_uniform, split)
    assert result.tokens == len(split.tokens) == 52
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-12)
    assert result.loss == pytest.approx(math.log(VOCAB), rel=1e-12)
    assert (result.bytes, result.words) == (2 * 48, 2 + 10 + 1 + 4)
    assert result.nats == pytest.approx(52 * math.log(VOCAB))
    assert result.bits_per_byte == pytest.approx(52 * math.log2(VOCAB) / 96)
    assert result.word_perplexity == pytest.approx(VOCAB ** (52 / 17))


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 40])
def test_every_token_is_scored_once_and_the_first_from_end_of_text(length: int, stride: int) -> None:
    split = _split([length])
    pairs = zip([END, *split.tokens.tolist()], split.tokens.tolist(), strict=False)
    expected = sum(left * VOCAB + right for left, right in pairs) / 1000
    result = _evaluate(_bigram, split, stride=stride)
    assert result.nats == pytest.approx(expected, rel=1e-12)
    assert result.tokens == length + 1


def test_windows_cover_every_target_once_with_as_much_context_as_promised() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        max_seq_len = int(random.integers(1, 20))
        stride = int(random.integers(1, max_seq_len + 1))
        bounds = np.cumsum([0, *random.integers(1, 60, size=random.integers(1, 6))])
        windows = cut_windows(bounds, max_seq_len=max_seq_len, stride=stride)
        covered = np.zeros(bounds[-1], dtype=int)
        for start, length, skip, opens in zip(windows.start, windows.length, windows.skip, windows.opens, strict=True):
            stream = np.searchsorted(bounds, start, side="right") - 1
            assert bounds[stream] <= start and start + length <= bounds[stream + 1], "a window stays in its stream"
            assert opens == (start == bounds[stream]) and (skip == 0 or not opens)
            assert 1 <= length <= max_seq_len and skip < length
            assert opens or (length == max_seq_len and skip >= max_seq_len - stride)
            covered[start + skip : start + length] += 1
        assert (covered == 1).all()


def test_the_result_does_not_depend_on_the_batch_size_or_on_the_padding() -> None:
    model = tiny_model(dropout=0.0).eval()
    split = _split([3, 50, 9, 20, 1])
    for per_document in (False, True):
        one, *others = [
            _evaluate(model.token_losses, split, batch_size=size, per_document=per_document) for size in (1, 2, 7, 1000)
        ]
        for other in others:
            assert other.nats == pytest.approx(one.nats, rel=1e-6)
            assert [part[2] for part in other.loss_by_position] == [
                pytest.approx(part[2], rel=1e-6) for part in one.loss_by_position
            ]


@pytest.mark.parametrize("processes", [2, 3, 7, 40])
def test_several_processes_together_give_the_same_result_and_run_the_model_equally_often(processes: int) -> None:
    """Threads in place of processes: each adds its totals when all have come."""
    split, options = _split([5, 30, 1, 12]), {"segment_tokens": 4}
    whole = _evaluate(_bigram, split, **options)
    gate, brought = threading.Barrier(processes), [np.zeros(0)] * processes
    calls, results = [0] * processes, [whole] * processes

    def score(rank: int) -> None:
        def total(values: np.ndarray) -> np.ndarray:
            brought[rank] = values
            gate.wait()
            summed = np.sum(brought, axis=0)
            gate.wait()
            return summed

        def losses(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
            calls[rank] += 1
            return _bigram(inputs_BT, targets_BT)

        results[rank] = _evaluate(losses, split, share=Share(rank, processes, total), **options)

    threads = [threading.Thread(target=score, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(calls)) == 1
    for result in results:
        assert result is not whole and (result.tokens, result.segments) == (whole.tokens, whole.segments)
        assert (result.loss, result.bits_per_byte) == pytest.approx((whole.loss, whole.bits_per_byte), rel=1e-12)
        assert [row[:2] for row in result.loss_by_position] == [row[:2] for row in whole.loss_by_position]
        assert [row[2] for row in result.loss_by_position] == pytest.approx([row[2] for row in whole.loss_by_position])


def test_strided_windows_equal_scoring_token_by_token_with_the_same_context() -> None:
    """The definition, written as a loop: stride 4 in windows of 8, a target sees the most that its window offers."""
    model = tiny_model(dropout=0.0).eval()
    split = _split([29])
    stream = [END, *split.tokens.tolist()]
    nats = 0.0
    scored_to, start = 0, 0
    while scored_to < 30:
        end = min(start + 8, 30)
        begin = max(0, end - 8)
        for target in range(scored_to, end):
            context, wanted = torch.tensor([stream[begin : target + 1]]), torch.tensor([[stream[target + 1]]])
            nats += -model.logits(context)[:, -1].log_softmax(-1).gather(1, wanted).item()
        scored_to, start = end, start + 4
    assert _evaluate(model.token_losses, split).nats == pytest.approx(nats, rel=1e-6)


def test_a_shorter_stride_gives_more_context_and_a_split_within_one_window_does_not_care() -> None:
    model = tiny_model(dropout=0.0).eval()
    short = _split([7])
    assert len({_evaluate(model.token_losses, short, stride=stride).nats for stride in (1, 4, 8)}) == 1

    def needs_context(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return (1.0 / torch.arange(1, inputs_BT.shape[1] + 1)).expand(targets_BT.shape)

    losses = [_evaluate(needs_context, _split([100]), stride=stride).loss for stride in (1, 2, 4, 8)]
    assert losses == sorted(losses) and len(set(losses)) == 4


def test_per_document_equals_every_document_evaluated_alone() -> None:
    model = tiny_model(dropout=0.0).eval()
    lengths = [3, 30, 8, 7, 1]
    split = _split(lengths)
    alone = []
    for begin, end, size, words in zip(
        split.document_starts[:-1], split.document_starts[1:], split.document_bytes, split.document_words, strict=True
    ):
        document = Split(split.tokens[begin:end], np.array([0, end - begin]), np.array([size]), np.array([words]))
        alone.append(_evaluate(model.token_losses, document))
    together = _evaluate(model.token_losses, split, per_document=True)
    assert together.nats == pytest.approx(sum(result.nats for result in alone), rel=1e-6)
    assert together.tokens == sum(result.tokens for result in alone) == len(split.tokens)
    assert together.bytes == sum(result.bytes for result in alone)
    assert together.nats != pytest.approx(_evaluate(model.token_losses, split).nats, rel=1e-4), "context matters here"


def test_max_tokens_evaluates_exactly_the_first_ones() -> None:
    split = _split([5, 30, 12])
    for limit in (1, 6, 20, 36, 50, 1000):
        part = Split(split.tokens[:limit], np.array([0, min(limit, 50)]), np.array([1]), np.array([1]))
        for per_document in (False, True):
            result = _evaluate(_bigram, split, max_tokens=limit, per_document=per_document)
            assert result.tokens == min(limit, 50)
            assert result.nats == pytest.approx(_evaluate(_bigram, part).nats, rel=1e-12)


def test_the_bytes_and_words_of_a_part_are_those_of_its_text() -> None:
    """One token a byte: every cut is compared with the text itself, cuts within a character drop the broken one."""
    broken = "\N{REPLACEMENT CHARACTER}"  # which a text may hold, and which part of a character looks like
    texts = ["one two", "dreiundzwanzig Äpfel, très bien", "\N{SNOWMAN} x", f"{broken}a{broken}{broken} ä{broken}\N{SNOWMAN}"]
    tokens = [token for text in texts for token in (*text.encode(), 256)]
    starts = np.cumsum([0, *(len(text.encode()) + 1 for text in texts)])
    split = Split(
        np.array(tokens, dtype=np.uint16),
        starts,
        np.array([len(text.encode()) for text in texts]),
        np.array([len(text.split()) for text in texts]),
    )

    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    for cut in range(1, len(tokens) + 1):
        pieces = bytes(token if token < 256 else 0 for token in tokens[:cut]).split(b"\0")
        whole = [piece.decode(errors="ignore") for piece in pieces]
        expected = sum(len(text.encode()) for text in whole), sum(len(text.split()) for text in whole)
        assert text_size(split, cut, decode) == expected, f"cut at {cut}"


def test_loss_by_position_is_the_mean_over_all_predictions_with_that_much_context() -> None:
    def position(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return torch.arange(1.0, inputs_BT.shape[1] + 1).expand(targets_BT.shape)

    result = _evaluate(position, _split([99]), max_seq_len=12, stride=6)
    assert [(low, high) for low, high, _ in result.loss_by_position] == [(1, 1), (2, 3), (4, 7), (8, 12)]
    assert [loss for _, _, loss in result.loss_by_position] == [1.0, 2.5, 5.5, 10.0]
    short = _evaluate(position, _split([4]), max_seq_len=12, stride=6)
    assert [(low, high) for low, high, _ in short.loss_by_position] == [(1, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize(("fraction", "stride"), [(0.35, 3), (0.45, 4), (0.4, 3), (0.05, 1), (1.0, 8)])
def test_a_fraction_of_the_window_is_the_nearest_stride(fraction: float, stride: int) -> None:
    def position(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return torch.arange(1.0, inputs_BT.shape[1] + 1).expand(targets_BT.shape)

    model: Any = SimpleNamespace(
        token_losses=lambda *given: position(*given[:2]),
        max_seq_len=8,
        training=False,
        eval=lambda: None,
        train=lambda mode: None,
    )
    result = evaluate_model(
        TokenLosses(model, precision=torch.float32, device=torch.device("cpu")),
        _split([99]),
        texts_of(END),
        Scoring(fraction, batch_size=4),
    )
    wanted, other = (_evaluate(position, _split([99]), max_seq_len=8, stride=each) for each in (stride, stride % 8 + 1))
    assert result.loss == wanted.loss != other.loss


def test_a_text_without_words_has_no_word_perplexity() -> None:
    split = _split([40])
    split.document_words[:] = 0
    assert _evaluate(_uniform, split).word_perplexity is None


@pytest.mark.parametrize("loss", [1.0, 100.0, 229.0])
@pytest.mark.parametrize("words", [1, 2, 10, 40])
def test_what_is_measured_is_taken_by_the_one_who_reads_records(loss: float, words: int) -> None:
    """Words may be very long: Chinese has no spaces between them, associative recall has none at all."""
    split = _split([40])
    split.document_words[:] = words
    result = _evaluate(lambda inputs, targets: torch.full(targets.shape, loss), split)
    figures = {key: getattr(result, key) for key in ("loss", "perplexity", "word_perplexity", "bits_per_byte")}
    assert typed(RunSummary, figures, "") == figures
    assert result.word_perplexity is None or result.word_perplexity < MOST_FIGURE


def test_a_word_perplexity_of_an_older_record_is_read() -> None:
    assert typed(RunSummary, {"word_perplexity": 4.9e301}, "") == {"word_perplexity": 4.9e301}


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_an_impossible_stride_is_refused(stride: int) -> None:
    with pytest.raises(UserError, match=f"stride_fraction={stride / 8} must be above 0 and at most 1"):
        _evaluate(_uniform, _split([5]), stride=stride)


def test_a_split_with_nothing_to_score_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to evaluate"):
        _evaluate(_uniform, _split([5]), max_tokens=0)
    with pytest.raises(UserError, match="hold no text"):
        _evaluate(_uniform, _split([5]), max_tokens=1, decode=lambda ids: "\N{REPLACEMENT CHARACTER}"[: 2 - len(ids)])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6, 231.0])
def test_a_broken_model_is_an_error_and_not_a_number_in_a_table(value: float) -> None:
    with pytest.raises(UserError, match="weights are broken"):
        _evaluate(lambda inputs, targets: torch.full(targets.shape, value), _split([5]))


def test_evaluating_leaves_no_gradient_and_no_trace_in_the_model() -> None:
    """Twice the same number, and training goes on afterwards: a pure function of weights and data."""
    model = tiny_model(dropout=0.0).eval()
    split = _split([50])
    state = torch.get_rng_state()
    assert _evaluate(model.token_losses, split) == _evaluate(model.token_losses, split)
    assert torch.equal(torch.get_rng_state(), state)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model.loss(tokens, tokens).backward()
