"""A run that no training made: weights from elsewhere (an import, a conversion) in the folder of an ordinary run.

config.yaml  tokenizer.json  checkpoints/step-N/   as train_model.py writes them, the optimizer's state empty
origin.json                                        where the weights came from and what was done to them
summary.json                                       once `score` has evaluated the validation split
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness.config.checks import RUN_NAME
from harness.config.run_config import save_run_config
from harness.config.schema import TrackingConfig, TrainConfig
from harness.data import PreparedData
from harness.errors import UserError
from harness.evaluation.evaluate import split_metrics
from harness.evaluation.losses import TokenLosses
from harness.evaluation.model_facts import model_facts
from harness.files.atomic import check_target, new_folder, read_json, write_json
from harness.files.folders import refuse_links
from harness.runs.corpus import validate
from harness.runs.folder import writing_to
from harness.runs.load import load_trained
from harness.runs.provenance import keep_changes
from harness.runs.records import RunSummary, save
from harness.runs.summary import Computation, Training, run_summary
from harness.runs.text_settings import TheirText
from harness.runs.to_dashboard import open_run_tracker
from harness.training.checkpoint import save_weights
from modeling.attention import EXECUTION

ORIGIN_FILE = "origin.json"


def target_folder(to: str) -> Path:
    """The folder of a run that is to be made. Raises UserError for a name that no run may have, and where something lies.

    What an earlier import or conversion left there is looked at by the one that finds it.
    """
    target = Path(to).expanduser().absolute()
    if not re.fullmatch(RUN_NAME, target.name):
        raise UserError(f"to={target} must end in one plain folder name: letters, digits and . _ = , + - only")
    if not (target / ORIGIN_FILE).is_file():
        check_target(target)
    return target


def make_run(
    config: TrainConfig,
    target: Path,
    *,
    write_model: Callable[[Path], None],
    model_bytes: int,
    tokenizer_file: Path | None,
    text: TheirText | None,
    origin: Mapping[str, Any],
    steps: int,
) -> None:
    """Write the run's folder at a temporary path and rename it to `target`: it is there whole, or not at all.

    write_model is handed the path of the safetensors file to write, of about model_bytes. tokenizer_file: None for plain
    bytes. text: of a checkpoint from elsewhere. origin is JSON-able; steps: optimizer steps behind the weights, 0 where
    nobody knows. Raises UserError when `target` exists and is not an empty folder, or cannot be written.
    """
    with new_folder(target) as temporary:
        save_run_config(config, temporary)
        keep_changes(temporary)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, temporary / "tokenizer.json")
        if text is not None:
            text.save(temporary)
        save_weights(temporary / "checkpoints", write_model=write_model, model_bytes=model_bytes, state={"step": steps})
        write_json(temporary / ORIGIN_FILE, origin)


def score(
    run: Path, data: PreparedData, *, tracking: TrackingConfig, tokens: int, device: torch.device, precision: torch.dtype
) -> RunSummary:
    """Evaluate the validation split as training does at its end, and write summary.json, which makes the run finished.

    data: the run's own, in its own tokens. tracking: checked before the work. tokens: trained on before, 0 where nobody
    knows. Returns the summary. Raises UserError when the data has no such split, or when the run cannot be written.
    """
    refuse_links(run)
    trained = load_trained(run, device=device, precision=precision, execution=EXECUTION)
    config = trained.config
    losses = TokenLosses(trained.model, precision=precision, device=device)
    result = validate(losses, config, data, trained.tokenizer, progress=True)
    facts, origin = model_facts(trained.model, config), read_json(run / ORIGIN_FILE)
    with writing_to(run):
        with open_run_tracker(
            config, tracking, run, run_config=dataclasses.asdict(config) | facts.record() | {"origin": origin}, metrics_bytes=0
        ) as tracker:
            tracker.log(trained.step, tokens, split_metrics(result))
            summary = run_summary(
                config,
                facts,
                data,
                result,
                training=Training(trained.step, tokens),
                computation=Computation(device, precision, trained.kernel),
                wandb_id=tracker.run_id,
            )
            summary["origin"] = origin
            tracker.summary(summary)
        save(run / "summary.json", RunSummary, summary)
    return summary
