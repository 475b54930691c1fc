"""The order of training windows."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from harness.data.loader import WindowLoader, documents_in, permute
from harness.errors import UserError

TOKENS = np.arange(10_000, dtype=np.uint16)


def loader(batch_size: int = 8, seed: int = 0, tokens: np.ndarray = TOKENS, **share: int) -> WindowLoader:
    return WindowLoader(tokens, max_seq_len=32, batch_size=batch_size, data_seed=seed, **share)


def test_an_epoch_takes_every_window_once() -> None:
    epoch = loader(batch_size=1)
    windows = [int(epoch.windows(step)[0]) for step in range(2 * epoch.windows_per_epoch)]
    first, second = windows[: epoch.windows_per_epoch], windows[epoch.windows_per_epoch :]
    assert sorted(first) == sorted(second) == list(range(epoch.windows_per_epoch))
    assert first != second != sorted(second)


def test_windows_start_at_multiples_of_the_length_and_overlap_by_the_target() -> None:
    batch = loader().batch(3)
    assert batch.shape == (8, 33) and batch.dtype == torch.int64
    for row in batch:
        assert row[0] % 32 == 0
        assert torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 33))


def test_no_token_is_out_of_reach_but_a_tail_shorter_than_a_window() -> None:
    assert loader(tokens=TOKENS[:65]).windows_per_epoch == 2
    assert loader(tokens=TOKENS[:64]).windows_per_epoch == 1
    assert loader(tokens=TOKENS[:33]).windows_per_epoch == 1


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    assert torch.equal(loader().batch(100), loader().batch(100))
    assert not torch.equal(loader().batch(100), loader(seed=1).batch(100))
    assert not torch.equal(loader().batch(100), loader().batch(101))


@pytest.mark.parametrize("step", [0, 38, 39, 77, 10**6])  # 312 windows: step 39 begins the second epoch
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_any_number_of_processes_share_one_global_batch(step: int, world_size: int) -> None:
    parts = [loader(rank=rank, world_size=world_size).batch(step) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), loader().batch(step))


def test_windows_do_not_depend_on_the_batch_size_and_batches_straddle_epochs() -> None:
    whole = loader(batch_size=312 * 3).windows(0)  # three epochs in one batch
    assert np.array_equal(np.concatenate([loader(batch_size=9).windows(step) for step in range(104)]), whole)


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 4096, 5000])
def test_every_size_gets_a_permutation(size: int) -> None:
    assert sorted(permute(np.arange(size), size, (3, 1))) == list(range(size))


def test_one_position_of_a_huge_permutation_costs_no_more_than_itself() -> None:
    values = permute(np.array([0, 1, 10**13]), 10**14, (0, 0))
    assert len(set(values)) == 3 and (values >= 0).all() and (values < 10**14).all()


def test_every_place_is_equally_likely_and_neighbours_are_independent() -> None:
    size, epochs = 7, 700
    orders = np.stack([permute(np.arange(size), size, (5, epoch)) for epoch in range(epochs)])
    places = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    expected = epochs / size
    chi_square = ((places - expected) ** 2 / expected).sum() * (size - 1) / size  # rows and columns have fixed sums
    assert chi_square < 73  # 36 degrees of freedom, p = 0.0003
    steps = np.bincount((orders[:, 1] - orders[:, 0]) % size, minlength=size)[1:]
    assert ((steps - epochs / 6) ** 2 / (epochs / 6)).sum() < 23  # 5 degrees, p = 0.0003


def test_the_order_never_changes_between_versions() -> None:
    assert permute(np.arange(10), 10, (0, 0)).tolist() == [2, 9, 5, 0, 1, 4, 8, 6, 3, 7]
    assert loader().windows(10**9).tolist() == [240, 123, 35, 143, 212, 245, 175, 23]


@pytest.mark.parametrize("share", [{}, {"rank": 1, "world_size": 2}])
def test_reading_ahead_changes_nothing(share: dict[str, int]) -> None:
    """Nor does working out the windows of many steps at once, over the ends of epochs and of such blocks."""
    batches = loader(**share).iterate(5, device="cpu")
    for step in range(5, 150):
        assert torch.equal(next(batches), loader(**share).batch(step))
    batches.close()


def test_the_reading_thread_ends_with_its_iterator() -> None:
    before = set(threading.enumerate())
    batches = loader().iterate(0, device="cpu")
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert not set(threading.enumerate()) - before


def test_an_error_in_the_reading_thread_is_raised_to_the_reader() -> None:
    broken = loader()
    broken.tokens = TOKENS[:100]  # as if the file had been cut since
    with pytest.raises(IndexError):
        next(broken.iterate(0, device="cpu"))


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"32 tokens, fewer than one window of 33.*max_seq_len"):
        loader(tokens=TOKENS[:32])


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size=8 cannot be shared by 3"):
        loader(world_size=3)


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu_unchanged() -> None:
    batches = loader().iterate(0, device="cuda")
    assert all(torch.equal(next(batches).cpu(), loader().batch(step)) for step in range(20))
    batches.close()


def test_the_documents_in_a_batch_are_those_whose_tokens_it_holds() -> None:
    starts = np.array([0, 5, 40, 41, 96, 100, 200])
    tokens = np.repeat(np.arange(6), np.diff(starts)).astype(np.uint16)  # each token is its document's number
    for windows in ([0], [1], [2], [3], [5], [0, 3], [4, 1]):
        starting = np.array(windows)
        held = {int(token) for window in windows for token in tokens[window * 32 : window * 32 + 33]}
        assert documents_in(starting, max_seq_len=32, document_starts=starts) == sorted(held)
