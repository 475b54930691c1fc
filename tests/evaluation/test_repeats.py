"""Repeats: which tokens count as one, and that they are compared with the same n-gram's first occurrence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.evaluation.probes.repeats import measure_repeats, repeated, repeats_rows
from tests.support.subjects import LossTable, documents, subject_of

END = 99


def by_context(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """A loss that says at which place of the window a target stands, from 1."""
    return torch.arange(1.0, inputs_BT.shape[1] + 1).expand(targets_BT.shape)


def pairs_by_hand(tokens: list[int], documents: list[int], n: int) -> set[tuple[int, int]]:
    """(first, repeat) of one row, by the definition."""
    found = set()
    for end in range(max(n - 1, 1), len(tokens)):
        gram, where = tokens[end - n + 1 : end + 1], documents[end - n + 1 : end + 1]
        for earlier in range(max(n - 1, 1), end):
            before = slice(earlier - n + 1, earlier + 1)
            if tokens[before] == gram and {*documents[before], *where} == {where[0]} and where[0] >= 0:
                found.add((earlier, end))
                break
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_repeats_are_those_of_the_definition(n: int) -> None:
    random = np.random.default_rng(n)
    for _ in range(20):
        tokens_BT = random.integers(0, 3, (3, 40))
        document_BT = np.sort(random.integers(-1, 3, (3, 40)), axis=1)
        row, first, repeat = repeated(tokens_BT, document_BT, n)
        found = {(int(b), int(f), int(r)) for b, f, r in zip(row, first, repeat, strict=True)}
        assert len(found) == len(row)
        assert found == {
            (b, *pair) for b in range(3) for pair in pairs_by_hand(tokens_BT[b].tolist(), document_BT[b].tolist(), n)
        }


def test_the_losses_of_a_text_whose_repeats_are_known() -> None:
    """a b c x a b c y a b c b c: the trigram abc ends at 3, 7 and 11, from 1; bc b and cbc are new."""
    a, b, c, x, y = range(5)
    split = documents([a, b, c, x, a, b, c, y, a, b, c, b, c], end_of_text=END)
    figures = measure_repeats(subject_of(LossTable(by_context, 16), split, end_of_text=END), n=3)
    assert figures is not None
    assert (figures["n"], figures["count"], figures["scored_tokens"]) == (3, 2, 14)
    assert (figures["first_loss"], figures["repeat_loss"], figures["gain"]) == (3.0, 9.0, -6.0)
    assert (figures["share"], figures["distance"]) == (2 / 14, 6.0)


def test_what_helps_repeats_alone_is_the_gain_exactly() -> None:
    """A table that charges 2 nats for a token that follows its left neighbour again, and 5 for the first time."""

    def looks_back(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        nats_BT = torch.full(targets_BT.shape, 5.0)
        for row in range(len(inputs_BT)):
            seen = set()
            for place, pair in enumerate(zip(inputs_BT[row].tolist(), targets_BT[row].tolist(), strict=True)):
                nats_BT[row, place] = 2.0 if pair in seen else 5.0
                seen.add(pair)
        return nats_BT

    split = documents(np.random.default_rng(0).integers(0, 12, 500), end_of_text=END)
    figures = measure_repeats(subject_of(LossTable(looks_back, 64), split, end_of_text=END), n=2)
    assert figures is not None and figures["count"] > 50
    assert (figures["first_loss"], figures["repeat_loss"], figures["gain"]) == (5.0, 2.0, 3.0)


def test_nothing_repeats_across_documents_or_windows() -> None:
    gram = [1, 2, 3, 4]
    apart = documents(gram, gram, gram, end_of_text=END)
    assert measure_repeats(subject_of(LossTable(by_context, 32), apart, end_of_text=END), n=3) is None
    filler = list(range(10, 26))
    far = documents([*gram, *filler, *gram, *filler], end_of_text=END)
    assert measure_repeats(subject_of(LossTable(by_context, 16), far, end_of_text=END), n=3) is None
    figures = measure_repeats(subject_of(LossTable(by_context, 64), far, end_of_text=END), n=3)
    assert figures is not None and figures["count"] == 18


def test_the_last_window_counts_only_what_the_one_before_has_not_scored() -> None:
    """20 tokens in windows of 16: the second starts at 4, shows 12 tokens again and scores the last 4."""
    split = documents([7, 8] * 9 + [7], end_of_text=END)
    figures = measure_repeats(subject_of(LossTable(by_context, 16), split, end_of_text=END), n=2)
    assert figures is not None
    # The first window's bigrams 78 and 87 repeat at its places 4 to 16; of the second one 13 to 15, the end being new.
    assert (figures["count"], figures["scored_tokens"]) == (13 + 3, 20)
    assert figures["repeat_loss"] == pytest.approx((sum(range(4, 17)) + 13 + 14 + 15) / 16)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_figures_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    split = documents(*np.random.default_rng(0).integers(0, 4, (5, 70)), end_of_text=END)
    table = LossTable(by_context, 32)
    figures = measure_repeats(subject_of(table, split, end_of_text=END, batch_size=batch_size))
    assert figures == measure_repeats(subject_of(table, split, end_of_text=END))


def test_no_more_tokens_are_scored_than_allowed_and_they_come_from_all_over_the_split() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, 4000)
    seen = []

    def remember(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        seen.append(inputs_BT)
        return by_context(inputs_BT, targets_BT)

    split = documents(tokens, end_of_text=END)
    figures = measure_repeats(subject_of(LossTable(remember, 32), split, end_of_text=END, max_tokens=320))
    assert figures is not None and figures["scored_tokens"] == 320
    assert torch.equal(torch.cat(seen)[5, 1:], torch.from_numpy(tokens[63 * 32 :][:31]))


def test_a_person_reads_both_losses() -> None:
    split = documents([1, 2, 3, 1, 2, 3], end_of_text=END)
    figures = measure_repeats(subject_of(LossTable(by_context, 8), split, end_of_text=END), n=3)
    assert figures is not None
    ((name, value),) = repeats_rows(figures)
    assert (name, value) == (
        "repeated 3-grams",
        "6.0000 nats, 3.0000 where they came first: −3.0000 gained; 14.3 % of the tokens; at its floor in full precision: "
        "says nothing",
    )
    assert figures["at_floor"]
    ((_, value),) = repeats_rows({key: figures[key] for key in figures if key != "at_floor"})  # of an older record
    assert value.endswith("14.3 % of the tokens")
    ((_, value),) = repeats_rows(figures | {"gain": -0.00004})
    assert ": 0.0000 gained; " in value


@pytest.mark.parametrize(("worth", "at_floor"), [(0.0, True), (0.5, False)])
def test_repetition_is_at_its_floor_unless_it_gains_more_than_chance_would(worth: float, at_floor: bool) -> None:
    """Losses are noise, less `worth` in the second half of the only document, which repeats the first."""

    def noisy(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        noise = torch.randn(inputs_BT.shape, generator=torch.Generator().manual_seed(0))
        return 5 + noise - worth * (torch.arange(inputs_BT.shape[1]) >= 500)

    split = documents(np.tile(np.random.default_rng(0).integers(0, END, 500), 2), end_of_text=END)
    figures = measure_repeats(subject_of(LossTable(noisy, 1001), split, end_of_text=END))
    assert figures is not None and figures["count"] >= 496 and figures["at_floor"] is at_floor
