"""Loss beyond the training length: the same targets at every context, each counted with its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.evaluation.evaluate import target_nats
from harness.evaluation.probes.beyond import beyond_rows, half, measure_beyond, window_starts
from modeling.attention.contract import randomise
from modeling.gpt import GPT
from tests.support.subjects import LossTable, documents, on_cpu, subject_of
from tests.support.variants import SIZES, gpt_from

END = 99


def text(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, END, tokens)


def by_context(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """A loss that says how much context there was."""
    return torch.arange(1.0, inputs_BT.shape[1] + 1).expand(targets_BT.shape)


def by_target(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """A loss that says which token was scored, whatever the context."""
    return targets_BT.double()


@pytest.mark.parametrize("length", [1000, 333])
def test_every_bin_holds_the_contexts_that_it_names(length: int) -> None:
    figures = measure_beyond(subject_of(LossTable(by_context, 8), documents(text(length), end_of_text=END), end_of_text=END))
    assert figures is not None
    assert [(entry["low"], entry["high"]) for entry in figures["bins"]] == [(1, 4), (5, 8), (9, 16), (17, 32)]
    assert [entry["loss"] for entry in figures["bins"]] == [2.5, 6.5, 12.5, 24.5]
    assert figures["in_length_loss"] == 6.5
    assert (figures["ratio_2x"], figures["ratio_4x"]) == pytest.approx((12.5 / 6.5, 24.5 / 6.5))
    assert [entry["tokens"] for entry in figures["bins"]] == [figures["targets"] * times for times in (1, 1, 2, 4)]


def test_every_bin_holds_the_same_targets() -> None:
    """Targets that differ in difficulty alone leave every ratio at 1, to the last digit."""
    figures = measure_beyond(
        subject_of(LossTable(by_target, 8), documents(text(2000), end_of_text=END), end_of_text=END, max_tokens=1500)
    )
    assert figures is not None
    assert len({round(entry["loss"], 9) for entry in figures["bins"]}) == 1
    assert all(entry["ratio"] == pytest.approx(1, rel=1e-12) for entry in figures["bins"])


def test_an_odd_training_length_is_compared_as_a_whole() -> None:
    figures = measure_beyond(subject_of(LossTable(by_context, 7), documents(text(500), end_of_text=END), end_of_text=END))
    assert figures is not None
    assert [(entry["low"], entry["high"], entry["loss"]) for entry in figures["bins"]] == [
        (1, 7, 4.0),
        (8, 14, 11.0),
        (15, 28, 21.5),
    ]


def test_windows_lie_in_the_text_are_spread_over_it_and_keep_to_the_budget() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        trained, factor = int(random.integers(1, 20)), int(random.choice([2, 4]))
        n_tokens, most = int(random.integers(1, 3000)), int(random.integers(1, 3000))
        starts = window_starts(n_tokens, trained, factor, most)
        assert starts.size * factor * trained <= most
        if starts.size:
            assert starts.min() >= 1 and starts.max() + factor * trained <= n_tokens
            assert (np.diff(starts, axis=1) == half(trained)).all()
            assert starts.shape[1] >= factor * trained // half(trained)
            assert len(np.unique(starts)) == starts.size
    spread = window_starts(1_000_000, 16, 4, 100_000)
    assert len(spread) == 8 and spread[-1, -1] > 999_000


def test_a_text_for_twice_the_length_only_says_nothing_of_four_times_and_a_shorter_one_nothing() -> None:
    table = LossTable(by_context, 8)
    twice = measure_beyond(subject_of(table, documents(text(28), end_of_text=END), end_of_text=END))
    assert twice is not None
    assert (twice["longest_context"], twice["ratio_2x"], twice["ratio_4x"]) == (16, 12.5 / 6.5, None)
    assert measure_beyond(subject_of(table, documents(text(27), end_of_text=END), end_of_text=END)) is None
    few = measure_beyond(subject_of(table, documents(text(900), end_of_text=END), end_of_text=END, max_tokens=100))
    assert few is not None and few["longest_context"] == 16
    none = subject_of(table, documents(text(900), end_of_text=END), end_of_text=END, max_tokens=60)
    assert measure_beyond(none) is None


@pytest.mark.parametrize("variant", ["attention=mha", "attention=mla", "attention.positions=none"])
def test_a_gpt_scores_each_position_as_a_prompt_that_long_would(variant: str) -> None:
    overrides = [*SIZES, "model.max_seq_len=8", *(["attention=mha"] if "none" in variant else []), variant]
    model: GPT = randomise(gpt_from(overrides, 100)).eval()
    longer: GPT = gpt_from(overrides, 100, max_seq_len=32).eval()
    longer.load_state_dict(model.state_dict())
    split = documents(text(68), end_of_text=END)
    figures = measure_beyond(subject_of(model, split, end_of_text=END, longer=lambda length: longer))
    assert figures is not None
    nats = {high: [] for high in (4, 8, 16, 32)}
    (starts,) = window_starts(69, 8, 4, 100_000)
    first, last = int(starts[0]) + 7 * 4, int(starts[-1]) + 4
    for target in range(first, last):
        # A window begins every four tokens: with context c, c - 1 more than a multiple of four before the target.
        for begin in (begin for begin in starts.tolist() if begin <= target < begin + 32):
            context = target - begin + 1
            tokens = split.tokens[None, target - context : target + 1].astype(np.int64)
            loss = target_nats(on_cpu(longer), tokens[:, :-1], tokens[:, 1:])
            nats[next(high for high in nats if context <= high)].append(loss[0, -1])
    assert figures["targets"] == last - first
    assert [len(nats[high]) for high in nats] == [entry["tokens"] for entry in figures["bins"]]
    assert [np.mean(nats[high]) for high in nats] == pytest.approx([entry["loss"] for entry in figures["bins"]], rel=1e-5)


def test_what_cannot_be_lengthened_is_not_measured() -> None:
    subject = subject_of(
        LossTable(by_context, 8), documents(text(900), end_of_text=END), end_of_text=END, longer=lambda length: None
    )
    assert measure_beyond(subject) is None


def test_a_person_reads_one_row_for_each_octave_beyond_training() -> None:
    figures = measure_beyond(subject_of(LossTable(by_context, 8), documents(text(900), end_of_text=END), end_of_text=END))
    assert figures is not None
    rows = beyond_rows(figures)
    assert [name for name, _ in rows] == ["loss at 9-16", "loss at 17-32"]
    assert rows[0][1].startswith("12.5000 nats per token, 1.923 of what it is at 5-8 on the same ")
