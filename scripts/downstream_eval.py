"""Standard tasks for a trained run, through lm-evaluation-harness.

python scripts/downstream_eval.py run=runs/NAME tasks=hellaswag,arc_easy
python scripts/downstream_eval.py run=runs/NAME tasks=mine task_dir=my_tasks      YAML files of your own
python scripts/downstream_eval.py run=runs/NAME tasks=gsm8k cache.dtype=int8      scored and written through such a cache

The harness's own tasks fetch their data from the Hugging Face hub unless it is cached. Prints a table and one JSON line;
each task's record stands in <run>/downstream/. Needs pip install -r requirements.txt -r requirements-extra.txt.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

import hashlib
import json
import time

from harness.config.identity import setup_hash
from harness.config.places import user_path
from harness.config.schema import CacheDtype, Device, Precision
from harness.entry.cli import chosen_run, parse_options, run_script
from harness.errors import UserError
from harness.files.atomic import write_json
from harness.files.folders import refuse_links
from harness.files.text import aligned
from harness.files.untrusted import Count, Positive
from harness.runs.evaluations import cache_label
from harness.runs.folder import storing
from harness.runs.kind import CACHE
from harness.runs.provenance import commit
from modeling.cache_formats import FORMS

if TYPE_CHECKING:
    from harness.runs.load import TrainedModel


@dataclass
class DownstreamCacheOptions:
    dtype: Annotated[CacheDtype | None, f"{FORMS}; null: none but for texts, and there as precision"] = None
    window: Annotated[Positive | None, "newest positions that a query sees, its own included; null: all"] = None
    sinks: Annotated[Count, "first positions that stay visible beside a window"] = 0


@dataclass
class DownstreamOptions:
    tasks: Annotated[str, "tasks, groups or tags, with commas between (`lm-eval ls tasks` lists them)"] = ""
    run: Annotated[str | None, "a run's folder or name; null: the newest finished run"] = None
    limit: Annotated[Positive | None, "only the first documents of each task: for a try, not for a result"] = None
    num_fewshot: Annotated[Count | None, "examples in the prompt; null: what the task says"] = None
    task_dir: Annotated[str | None, "a folder with tasks of your own; their names come before the harness's"] = None
    batch_size: Annotated[Positive, "sequences per forward pass"] = 16
    device: Annotated[Device, "auto, cpu, cuda or mps"] = "auto"
    precision: Annotated[Precision, "auto, float32 or bfloat16"] = "auto"
    runs_dir: Annotated[str, "where runs are looked for"] = str(ROOT / "runs")
    cache: DownstreamCacheOptions = field(default_factory=DownstreamCacheOptions)


def main(arguments: list[str]) -> int:
    options = parse_options(DownstreamOptions, arguments)
    names = check(options)
    run = chosen_run(options.run, options.runs_dir)

    from harness.evaluation.evaluate import CacheChoice
    from harness.hf.lm_eval import Answers, check_room, choose_tasks, run_task
    from harness.runs.load import decode_path, load_trained
    from harness.runs.summary import Computation
    from harness.training.device import select_device, select_precision
    from modeling.attention import EXECUTION
    from modeling.attention.quantisation import cache_format

    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    chosen = choose_tasks(names, None if options.task_dir is None else user_path(options.task_dir))
    refuse_links(run)
    trained = load_trained(run, device=device, precision=precision, execution=EXECUTION)
    computation = Computation(device, precision, trained.kernel)
    for task in chosen:
        check_room(task, trained.model.max_seq_len)
    dtype, window, sinks = options.cache.dtype, options.cache.window, options.cache.sinks
    kept = precision if dtype is None else cache_format(dtype)
    through = None if dtype is None and window is None else CacheChoice(kept, window, sinks)
    if through is not None:
        through.check_window(trained.model.max_seq_len)
    answers = Answers(
        trained.model,
        trained.tokenizer,
        precision=precision,
        device=device,
        batch_size=options.batch_size,
        progress=True,
        through=through,
    )

    path = decode_path(trained.model, cache=kept, precision=precision, window=window)
    records = []
    for task in chosen:
        started = time.perf_counter()
        asked = {"task": task.name, "limit": options.limit, "num_fewshot": options.num_fewshot}
        record: dict[str, Any] = facts_of(trained) | asked
        record |= run_task(task, answers, num_fewshot=options.num_fewshot, limit=options.limit)
        record |= {
            "seconds": time.perf_counter() - started,
            "kernel": computation.kernel,
            "decode": path if task.writes or through is not None else None,
            "cache_dtype": None if through is None else dtype or computation.precision_name,
            "cache_window": window,
            "cache_sinks": sinks,
            "device": computation.device_name,
            "precision": computation.precision_name,
            "checkpoint": trained.checkpoint,
            "commit": commit(),
        }
        keep_task_record(run, record)
        records.append(record)
    print_tasks(records)
    print(json.dumps({"run": str(run), "records": records}), flush=True)
    return 0


def facts_of(trained: TrainedModel) -> dict[str, Any]:
    """What a record says of the run."""
    from harness.data.tokenizer import tokenizer_fingerprint

    config = trained.config
    return {
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
    }


def check(options: DownstreamOptions) -> list[str]:
    """The names of the tasks. Raises UserError for what can be refused before a run is loaded."""
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("no task is named: give tasks=hellaswag,arc_easy or whatever `lm-eval ls tasks` lists")
    if options.cache.sinks and options.cache.window is None:
        raise UserError(f"cache.sinks={options.cache.sinks} stay visible beside a window: set cache.window too")
    return names


def keep_task_record(run: Path, record: dict[str, Any]) -> None:
    """Store a task's record in the run; the same one done again replaces its file, another stands beside it.

    Raises UserError when the run's folder cannot be written.
    """
    shaping = ["fingerprint", "limit", "num_fewshot", "precision", "checkpoint"]
    if record["cache_dtype"] is not None:
        shaping += [key for key in CACHE if key != "through_cache"]
    digest = hashlib.sha256(json.dumps([record[key] for key in shaping]).encode()).hexdigest()
    with storing(record["task"], run):
        write_json(run / "downstream" / f"{record['task'].replace('/', '_')}-{digest[:8]}.json", record)


def print_tasks(records: list[dict[str, Any]]) -> None:
    """For people; the JSON line follows."""
    head = ("task", "metric", "value", "+-", "shots", "documents")
    rows = [head] + [
        (
            row["task"],
            row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})",
            number(row["value"]),
            number(row["stderr"]),
            number(row["num_fewshot"]),
            number(row["documents"]),
        )
        for record in records
        for row in record["metrics"]
    ]
    print("\n".join(aligned(rows, left=(0, 1))))
    if records[0]["cache_dtype"] is not None:
        print(f"scored and written through a cache of {cache_label(records[0])}; {records[0]['decode']}")
    limited = {record["limit"] for record in records} - {None}
    if limited:
        print(f"only the first {limited.pop()} documents of each task: a try, not a result")


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    run_script(main, description=__doc__, options=DownstreamOptions)
