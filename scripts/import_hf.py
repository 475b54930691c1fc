"""A Hugging Face model as a run of ours: python scripts/import_hf.py source=PATH_OR_NAME to=runs/NAME.

Llama, Mistral, Ministral, Phi-3, Qwen2 (2.5) and Qwen3, with the windows of their layers, Qwen3.5's models of text
alone, with its layers of linear attention, and DeepSeek-V2 and V3 whose layers are all dense. The weights keep their values and
the model its function: what cannot be kept exactly is refused, naming the field; tensors that transformers' class leaves out,
such as heads for several tokens at once, are left out and named. With score=false nothing is scored; the same
command with score=true does it later. dataset=NAME is what the run is scored on, wikitext2 unless said.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

from harness.config.places import user_path
from harness.config.schema import Device, Precision, Tracker, TrackingConfig
from harness.entry.cli import parse_options, run_script
from harness.errors import UserError


@dataclass
class ImportDatasetOptions:
    path: Annotated[str | None, "of dataset=local, or a folder with prepared data"] = None


@dataclass
class ImportOptions:
    source: Annotated[
        str | None, "a folder with config.json, tokenizer.json and safetensors, or NAME or NAME@REVISION on the hub"
    ] = None
    to: Annotated[str | None, "the run's folder: absent, or empty"] = None
    dataset: ImportDatasetOptions = field(default_factory=ImportDatasetOptions)
    max_seq_len: Annotated[int | None, "positions; null: the model's whole context (fewer take less memory)"] = None
    score: Annotated[bool, "score the validation split, so that eval_model.py and compare_runs.py take the run"] = True
    tracking: Annotated[Tracker, "what the score is logged to: wandb, trackio or none"] = "wandb"
    data_dir: Annotated[str, "where prepared data lies"] = str(ROOT / "artifacts" / "data")
    device: Annotated[Device, "auto, cpu, cuda or mps"] = "auto"
    precision: Annotated[Precision, "auto, float32 or bfloat16"] = "auto"


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

    from harness.hf import importing
    from harness.hf.checkpoint_files import find_checkpoint
    from harness.runs import from_weights
    from harness.runs.folder import finished, short_line
    from harness.tracking import check_tracking
    from harness.training.device import select_device, select_precision

    if options.score:
        check_tracking(TrackingConfig(name=options.tracking))
    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    target = from_weights.target_folder(options.to)
    plan = importing.plan_import(find_checkpoint(options.source), target, overrides=overrides, max_seq_len=options.max_seq_len)
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
            data = importing.score_data(plan, target)
            summary = from_weights.score(
                target, data, tracking=plan.config.tracking, tokens=0, device=device, precision=precision
            )
        except UserError as error:
            raise UserError(f"{target} is imported but not scored, and the same command scores it later: {error}") from None
        print(short_line(summary, target / "summary.json"))
    else:
        print("not scored: the same command with score=true does it, and eval_model.py then takes the run")
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__, options=ImportOptions, groups=("dataset",))
