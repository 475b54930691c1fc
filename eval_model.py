"""Evaluate a finished run: perplexity per token and per word, bits per byte, loss by position, cache bytes.

python eval_model.py                                    the newest finished run, test split
python eval_model.py run=runs/NAME split=validation
python eval_model.py run=all                            every finished run
python eval_model.py run=NAME dataset=stdlib            another corpus
python eval_model.py run=NAME dataset.path=NEW          the run's own corpus, which lies there now
python eval_model.py run=NAME cache.dtype=int8          through a quantised cache, beside the full-precision figures
python eval_model.py run=NAME cache.window=64 cache.sinks=4
python eval_model.py run=NAME extras=[]                 perplexity alone, none of what is measured beside it
"""

# The environment comes first: what follows may only exist in the project's .venv.
# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -I, -P and PYTHONSAFEPATH leave it out

from harness.entry.bootstrap import enter_environment

enter_environment()

import json
from collections.abc import Sequence
from typing import Any, cast

from harness.config.compose import load_eval_config
from harness.config.run_config import find_run
from harness.config.schema import MOST_FIGURE, EvalConfig
from harness.entry.cli import finished_runs, newest_run, run_hydra
from harness.errors import UserError, tell
from harness.evaluation.metric import LOSS, PERPLEXITY, SCORES
from harness.evaluation.perplexity import SplitResult
from harness.evaluation.probes import extras_rows
from harness.files.text import number, visible
from harness.runs.evaluate_run import keep_record, score_run
from harness.runs.evaluations import cache_label
from harness.runs.folder import finished, short_line
from harness.runs.records import Evaluation
from harness.tracking import check_tracking


def main(overrides: list[str]) -> int:
    """Evaluate one run, or all; a table and one JSON line each."""
    config = load_eval_config(overrides)
    check_tracking(config.tracking)
    runs = chosen_runs(config)
    failed = []
    for run in runs:
        try:
            scored = score_run(run, config)
            print_evaluation(scored.record, scored.result)
            try:
                file = keep_record(run, scored, config)
            except BaseException:  # what could not be stored is at least said
                print(json.dumps(scored.record), flush=True)
                raise
            print(short_line(scored.record, file), flush=True)
        except UserError as error:
            if len(runs) == 1:
                raise
            tell(f"error: {run.name}: {error}")
            failed.append(run.name)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs could not be evaluated: {', '.join(failed)}; see above")
    return 0


def chosen_runs(config: EvalConfig) -> list[Path]:
    """The runs that `run` means. Raises UserError when there is none."""
    runs_dir = Path(config.runs_dir)
    if config.run is not None and config.run != "all":
        run = find_run(config.run, runs_dir)
        if not finished(run):
            raise UserError(f"run={config.run} is not finished; the command that started it continues it")
        return [run]
    newest, runs = newest_run(runs_dir), finished_runs(runs_dir)
    if config.run == "all":
        return runs
    if len(runs) > 1:
        others = ", ".join(run.name for run in reversed(runs[:-1]))
        print(f"evaluating the newest finished run, {visible(newest.name)}; others (run=...): {visible(others)}")
    return [newest]


def print_evaluation(record: Evaluation, result: SplitResult) -> None:
    """For people; the JSON line follows."""
    word = f"{MOST_FIGURE:g} or more" if result.word_perplexity is None else f"{result.word_perplexity:,.2f}"
    rows = [
        ("run", record["name"]),
        (
            "corpus",
            f"{record['dataset']}, {record['split']} split: {result.tokens:,} tokens, {result.bytes:,} bytes, "
            f"{result.words:,} words",
        ),
        ("loss", f"{LOSS.text(result.loss)} {LOSS.unit}"),
        ("perplexity", f"{PERPLEXITY.text(result.perplexity)} per token, {word} per word"),
        *((score.unit, score.text(score.of(record))) for score in SCORES.values() if score not in (LOSS, PERPLEXITY)),
        (
            "KV cache",
            f"{record['cache_bytes_per_token']:,} bytes per token in {record['cache_dtype']}, "
            f"{record['cache_bytes_at_context']:,} at {record['cache_context']:,} tokens, measured",
        ),
        *(through_rows(record, result) if record["through_cache"] else ()),
        ("kernel", f"{record['kernel']} on {record['device']}, {record['precision']}, {record['seconds']:.1f} s"),
    ]
    without = record.get("extras_without_cache")
    extras = extras_rows(cast("dict[str, Any]", record["extras"]), cast("dict[str, Any] | None", without))
    lines = [f"{visible(name):<18}{visible(value)}" for name, value in (*rows, *extras)]
    lines[len(rows) : len(rows)] = position_table(result.loss_by_position)
    print("\n".join(lines))


def position_table(losses: Sequence[tuple[int, int, float]]) -> list[str]:
    """Two lines for every ten columns: tokens of context, and the loss (nats per token) with so many."""
    cells = [(str(low) if low == high else f"{low}-{high}", f"{loss:.4f}") for low, high, loss in losses]
    lines = []
    for start in range(0, len(cells), 10):
        part = cells[start : start + 10]
        lines += [
            f"{title:<18}{''.join(f'{cell[row]:<11}' for cell in part).rstrip()}"
            for row, title in enumerate(("context, tokens", "loss with it"))
        ]
    return lines


def through_rows(record: Evaluation, result: SplitResult) -> list[tuple[str, str]]:
    """What scoring through the cache changed."""
    without, divergence = result.beside
    return [
        ("scored through", f"a cache of {cache_label(record)}; {record['decode']}"),
        (
            "without it",
            f"perplexity {PERPLEXITY.text(without.perplexity)}, {without.bits_per_byte:.4f} bits per byte "
            f"({number(100 * (result.perplexity / without.perplexity - 1), '+.3f')} % perplexity through it)",
        ),
        ("divergence", f"{divergence.loss:.6f} nats per token: mean KL from the distributions without it to those through it"),
    ]


if __name__ == "__main__":
    run_hydra(__file__, "eval", main, description=__doc__)
