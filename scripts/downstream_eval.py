"""Standard tasks for a trained run, through lm-evaluation-harness.

python scripts/downstream_eval.py run=runs/NAME tasks=hellaswag,arc_easy
python scripts/downstream_eval.py run=runs/NAME tasks=mine task_dir=my_tasks      YAML files of your own

The harness's own tasks fetch their data from the Hugging Face hub unless it is cached. Prints a table and one JSON line;
each task's record stands in <run>/downstream/. Needs pip install -r requirements.txt -r requirements-extra.txt.

tasks        names of tasks, groups or tags, with commas between (`lm-eval ls tasks` lists them)
run          a run's folder or name; without one, the newest finished run
limit        null    only the first documents of each task: for a try, not for a result
num_fewshot  null    examples in the prompt; null: what the task says
task_dir     null    a folder with tasks of your own; their names come before the harness's
batch_size   16      device  auto      precision  auto (float32 | bfloat16)      runs_dir  runs
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import ROOT, enter_environment

enter_environment()

import hashlib
import json
import time

from harness.command_line import newest_run, parse_options, run_script
from harness.config import find_run, setup_hash, user_path
from harness.errors import UserError
from harness.run import commit, write_json


@dataclass
class DownstreamOptions:
    tasks: str = ""
    run: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    task_dir: str | None = None
    batch_size: int = 16
    device: str = "auto"
    precision: str = "auto"
    runs_dir: str = str(ROOT / "runs")


def main(arguments: list[str]) -> int:
    options = parse_options(DownstreamOptions, arguments)
    names = check(options)
    runs_dir = user_path(options.runs_dir)
    run = find_run(options.run, runs_dir) if options.run is not None else newest_run(runs_dir)

    import torch

    from harness.evaluation.lm_eval import Answers, check_room, choose_tasks, run_task
    from harness.session import decode_path, load_trained, tokenizer_fingerprint
    from harness.training.device import select_device, select_precision
    from modeling.attention import EXECUTION

    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    chosen = choose_tasks(names, None if options.task_dir is None else user_path(options.task_dir))
    trained = load_trained(run, device=device, precision=precision, execution=EXECUTION)
    for task in chosen:
        check_room(task, trained.model.max_seq_len)
    answers = Answers(
        trained.model, trained.tokenizer, precision=precision, device=device, batch_size=options.batch_size,
        progress=True,
    )  # fmt: skip

    records = []
    for task in chosen:
        started = time.perf_counter()
        config = trained.config
        record: dict[str, Any] = {
            "name": config.name,
            "attention": config.attention["name"],
            "model": config.model.name,
            "trained_on": config.dataset.name,
            "seed": config.seed,
            "setup_hash": setup_hash(config),
            "tokenizer_fingerprint": tokenizer_fingerprint(trained.tokenizer_file),
            "steps": trained.step,
            "tokens": trained.step * config.batch_size * config.model.max_seq_len,
            "max_seq_len": trained.model.max_seq_len,
            "task": task.name,
            "limit": options.limit,
            "num_fewshot": options.num_fewshot,
        }
        record |= run_task(task, answers, num_fewshot=options.num_fewshot, limit=options.limit)
        record |= {
            "seconds": time.perf_counter() - started,
            "kernel": trained.kernel,
            "decode": decode_path(trained.model) if task.writes else None,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": str(precision).removeprefix("torch."),
            "checkpoint": trained.checkpoint,
            "commit": commit(),
        }
        keep_record(run, record)
        records.append(record)
    print_table(records)
    print(json.dumps({"run": str(run), "records": records}), flush=True)
    return 0


def check(options: DownstreamOptions) -> list[str]:
    """The names of the tasks. Raises UserError for what can be refused before a run is loaded."""
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("no task is named: give tasks=hellaswag,arc_easy or whatever `lm-eval ls tasks` lists")
    for key, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        value = getattr(options, key)
        if value is not None and value < least:
            raise UserError(f"{key}={value} must be at least {least}")
    return names


def keep_record(run: Path, record: dict[str, Any]) -> None:
    """Store a task's record in the run; the same one done again replaces its file, another stands beside it.

    Raises UserError when the run's folder cannot be written.
    """
    shaping = ("fingerprint", "limit", "num_fewshot", "precision", "checkpoint")
    digest = hashlib.sha256(json.dumps([record[key] for key in shaping]).encode()).hexdigest()
    try:
        write_json(run / "downstream" / f"{record['task'].replace('/', '_')}-{digest[:8]}.json", record)
    except OSError as error:
        raise UserError(
            f"the record of {record['task']} cannot be stored in {run} ({error.strerror}): make the folder writable, or "
            f"copy the run to one that is"
        ) from None


def print_table(records: list[dict[str, Any]]) -> None:
    """For people; the JSON line follows."""
    head = ("task", "metric", "value", "+-", "shots", "documents")
    rows = [head] + [
        (row["task"], row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})",
         number(row["value"]), number(row["stderr"]), number(row["num_fewshot"]), number(row["documents"]))
        for record in records for row in record["metrics"]
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        words = [word.ljust(width) if column < 2 else word.rjust(width)
                 for column, (word, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        print("  ".join(words).rstrip())
    limited = {record["limit"] for record in records} - {None}
    if limited:
        print(f"only the first {limited.pop()} documents of each task: a try, not a result")


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    run_script(main, description=__doc__)
