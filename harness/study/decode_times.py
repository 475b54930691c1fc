"""What a token costs to decode for each arm of a study: whole models of their shapes with random weights and caches.

Speed does not depend on what weights and caches hold, so nothing needs to be trained first, and a context may be longer
than the one in training. How it is timed is said in harness/decode/speed.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from harness.config.build import build_model
from harness.config.schema import TrainConfig
from harness.decode.speed import DecodeTime, machine_name, measure_cell
from harness.decode.subjects import DecodePlan, DecodeSubject, Skipped, footprint, plan_cells
from harness.errors import as_user_error
from harness.runs.load import pin_execution
from harness.runs.records import DecodeRow
from harness.training.device import keep_freed_memory, memory_bytes
from modeling.attention import with_most_paths
from modeling.kernels.decode_kernels import check_capture

MULTIPLES = (1, 4, 16)  # of the longest sequence trained on, where no contexts are given


def decode_times(
    configs: Mapping[str, TrainConfig],
    *,
    vocab_size: int,
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    max_seconds: float,
) -> list[DecodeRow]:
    """A row for each arm, context (tokens already cached; none given: MULTIPLES) and batch size.

    A row's milliseconds are the median of a step, which is a token in each of `batch` sequences, low and high their
    quartiles. Weights, caches and arithmetic are in `dtype`.

    Arms are timed in turns. What does not fit into half of the device's memory is left out. The smallest places (batch
    times context) come first, each with an equal share of the seconds that are left, and those that max_seconds does not
    reach are left out for all arms alike; a place that has begun is read at least once. What is left out is printed.
    Raises UserError for sizes that do not fit together.
    """
    began = time.perf_counter()
    if not contexts:
        longest = max(config.model.max_seq_len for config in configs.values())
        contexts = [multiple * longest for multiple in MULTIPLES]
    plan = DecodePlan(
        contexts=tuple(sorted(set(contexts))),
        batch_sizes=tuple(sorted(set(batch_sizes))),
        device=device,
        dtype=dtype,
        cache_dtype=dtype,
        budget_bytes=memory_bytes(device) // 2,
    )
    keep_freed_memory(device)
    subjects = [_subject(name, config, vocab_size, plan) for name, config in configs.items()]
    cells = sorted(plan_cells(subjects, plan), key=lambda cell: cell.batch_size * cell.context)
    rows: list[DecodeRow] = []
    skipped: list[Skipped] = []
    for place in tqdm(range(len(cells)), desc="decode", unit="place", disable=None):
        left = max_seconds - (time.perf_counter() - began)
        if left <= 0:
            reason = f"the {max_seconds:g} seconds for it were over"
            skipped += [Skipped("every arm", cell.batch_size, cell.context, 1, reason) for cell in cells[place:]]
            break
        figures, missing = measure_cell(cells[place], plan, seconds=left / (len(cells) - place))
        skipped += missing
        rows += [_row(figure, plan) for figure in figures]
    for each in skipped:
        print(f"decode time of {each.row} at batch {each.batch_size}, context {each.context:,} left out: {each.reason}")
    return rows


def _row(figure: DecodeTime, plan: DecodePlan) -> DecodeRow:
    return {
        "arm": figure.variant,
        "context": figure.context,
        "batch": figure.batch_size,
        "milliseconds": figure.call.median * 1e3,
        "low": figure.call.low * 1e3,
        "high": figure.call.high * 1e3,
        "n": figure.call.n,
        "device": machine_name(plan.device),
        "path": figure.path,
        "cache_bytes_per_token": figure.cache_bytes_per_token,
        "step": plan.step_used,
    }


def _subject(name: str, config: TrainConfig, vocab_size: int, plan: DecodePlan) -> DecodeSubject:
    """A model of the arm's shape, with positions for the longest context, on the path that one token takes."""
    with torch.device(plan.device):
        model = build_model(config, vocab_size, max_seq_len=plan.contexts[-1] + plan.room).to(plan.dtype).eval()
    choosing = with_most_paths(model.attentions)
    kernel = config.attention["kernel"]
    if plan.step_used == "graph":
        with as_user_error(f"{name}: "):
            check_capture(kernel)
    pin_execution(model, config.attention, device=plan.device, precision=plan.dtype)
    path = "auto"
    if choosing.decode_paths != ("auto",):
        path = "absorbed" if choosing.absorbs(1) else "expand"
    sizes = footprint(model, dtype=plan.dtype, cache_dtype=plan.cache_dtype)
    return DecodeSubject(name, model, (path,), sizes, kernel=kernel)
