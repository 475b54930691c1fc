"""A Hugging Face model as a run of ours: python scripts/import_hf.py source=PATH_OR_NAME to=runs/NAME.

source        a folder with config.json, tokenizer.json and safetensors, or NAME or NAME@REVISION on the hub
to            the run's folder: absent, or empty
dataset       wikitext2: what the run is scored on, as in train_model.py
dataset.path  null: of dataset=local, or a folder with prepared data
max_seq_len   null: the model's whole context; fewer positions take less memory
score         true: score the validation split, so that eval_model.py and compare_runs.py take the run
tracking      wandb: what the score is logged to, as in train_model.py
data_dir      artifacts/data
device        auto
precision     auto

Llama, Mistral, Qwen2 (2.5), Qwen3, and DeepSeek-V2 and V3 whose layers are all dense. The weights keep their values and
the model its function: what cannot be kept exactly is refused, naming the field. With score=false nothing is scored; the
same command with score=true does it later.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import ROOT, enter_environment

enter_environment()

from harness.command_line import parse_options, run_script
from harness.config import user_path
from harness.errors import UserError


@dataclass
class DatasetOptions:
    path: str | None = None


@dataclass
class ImportOptions:
    source: str | None = None
    to: str | None = None
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    max_seq_len: int | None = None
    score: bool = True
    tracking: str = "wandb"
    data_dir: str = str(ROOT / "artifacts" / "data")
    device: str = "auto"
    precision: str = "auto"


def main(arguments: list[str]) -> int:
    # `dataset` is a choice and a group of fields, as in train_model.py.
    chosen = [argument for argument in arguments if argument.startswith("dataset=")]
    options = parse_options(ImportOptions, [argument for argument in arguments if argument not in chosen])
    if not options.source:
        raise UserError("source= is missing: name a folder, or a model on the hub as in source=Qwen/Qwen2.5-0.5B")
    if not options.to:
        raise UserError("to= is missing: name the run's folder, as in to=runs/NAME")
    overrides = [*chosen, f"tracking={options.tracking}", f"data_dir={user_path(options.data_dir)}"]
    if options.dataset.path is not None:
        overrides.append(f"dataset.path={options.dataset.path}")

    from harness import importing, made
    from harness.export import check_target
    from harness.run import finished
    from harness.training.device import select_device, select_precision

    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    target = Path(options.to).expanduser().absolute()
    made.check_name(target)
    if not (target / made.ORIGIN_FILE).is_file():  # an earlier import is looked at below
        check_target(target)
    plan = importing.plan_import(
        importing.find_source(options.source), target, overrides=overrides, max_seq_len=options.max_seq_len
    )
    there = importing.already_imported(plan, target)
    if not there:
        importing.import_model(plan, target)
    for line in plan.lines():
        print(line)
    print(f"{'already in' if there else 'written to':<11} {target}")
    if finished(target):
        print("scored      already: python eval_model.py takes the run")
    elif options.score:
        try:
            summary = made.score(target, tokens=0, device=device, precision=precision)
        except UserError as error:
            raise UserError(
                f"{target} is imported but not scored, and the same command scores it later: {error}"
            ) from None
        print(json.dumps({key: summary[key] for key in (
            "name", "attention", "parameters", "dataset", "split", "evaluated_tokens", "loss", "perplexity", "bits_per_byte",
            "cache_bytes_per_token",
        )}))  # fmt: skip
    else:
        print("not scored: the same command with score=true does it, and eval_model.py then takes the run")
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__)
