"""Evaluate finished runs: python eval_model.py [run=runs/NAME|all] [split=test] [dataset=...]."""

# The environment comes first: what follows may only exist in the project's .venv.
# ruff: noqa: E402
from __future__ import annotations

from harness.bootstrap import enter_environment

enter_environment()

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.command_line import finished_runs, newest_run, run_hydra
from harness.comparison import cache_label
from harness.config import find_run, load_eval_config
from harness.errors import UserError
from harness.run import finished
from harness.schema import EvalConfig
from harness.tracking import check_tracking

if TYPE_CHECKING:
    from harness.evaluation.perplexity import SplitResult


def main(overrides: list[str]) -> int:
    """Evaluate one run, or all; a table and one JSON line each."""
    config = load_eval_config(overrides)
    check_tracking(config.tracking)
    runs = chosen_runs(config)

    from harness.score import keep_record, score_run

    failed = []
    for run in runs:
        try:
            record, result = score_run(run, config)
            print_table(record, result)
            try:
                keep_record(run, record, config, result.segments)
            finally:  # the JSON line comes last, and it comes whatever becomes of the record
                print(json.dumps(record), flush=True)
        except UserError as error:
            if len(runs) == 1:
                raise
            print(f"error: {run.name}: {error}", file=sys.stderr)
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
        print(f"evaluating the newest finished run, {newest.name}; others (run=...): {others}")
    return [newest]


def print_table(record: dict[str, Any], result: SplitResult) -> None:
    """For people; the JSON line follows."""
    from harness.evaluation.extras import extras_rows

    word = "beyond a float" if result.word_perplexity is None else f"{result.word_perplexity:,.2f}"
    rows = [
        ("run", record["name"]),
        ("corpus", f"{record['dataset']}, {record['split']} split: {result.tokens:,} tokens, {result.bytes:,} bytes, "
                   f"{result.words:,} words"),
        ("loss", f"{result.loss:.4f} nats per token"),
        ("perplexity", f"{result.perplexity:,.3f} per token, {word} per word"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("KV cache", f"{record['cache_bytes_per_token']:,} bytes per token in {record['cache_dtype']}, "
                     f"{record['cache_bytes_at_context']:,} at {record['cache_context']:,} tokens, measured"),
        *(through_rows(record) if record["through_cache"] else ()),
        ("kernel", f"{record['kernel']} on {record['device']}, {record['precision']}, {record['seconds']:.1f} s"),
        *((f"loss at {low}-{high}", f"{loss:.4f} nats per token, with so many tokens of context")
          for low, high, loss in result.loss_by_position),
        *extras_rows(record["extras"]),
    ]  # fmt: skip
    for name, value in rows:
        print(f"{name:<18}{value}")


def through_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What scoring through the cache changed."""
    before, after = record["perplexity_without_cache"], record["perplexity"]
    return [
        ("scored through", f"a cache of {cache_label(record)}; {record['decode']}"),
        ("without it", f"perplexity {before:,.3f}, {record['bits_per_byte_without_cache']:.4f} bits per byte "
                       f"({100 * (after / before - 1):+.3f} % perplexity through it)"),
        ("extras", "none: they are measured without a cache"),
    ]  # fmt: skip


if __name__ == "__main__":
    run_hydra(__file__, "eval", main, description=__doc__)
