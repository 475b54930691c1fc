"""A run that no training made: weights from elsewhere (an import, a conversion) in the folder of an ordinary run.

config.yaml  tokenizer.json  checkpoints/step-N/   as train_model.py writes them, the optimizer's state empty
origin.json                                        where the weights came from and what was done to them
summary.json                                       once `score` has evaluated the validation split
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness.config import RUN_NAME, save_run_config
from harness.data import prepare
from harness.errors import UserError
from harness.evaluation.evaluate import split_metrics
from harness.export import check_target
from harness.facts import model_facts
from harness.run import read_json, write_json
from harness.schema import TrainConfig
from harness.session import load_trained, open_run_tracker, run_summary, validate
from harness.training.checkpoint import save_weights
from modeling.attention import EXECUTION

ORIGIN_FILE = "origin.json"


def check_name(target: Path) -> None:
    """Raises UserError unless the folder's name is one that a run may have."""
    if not re.fullmatch(RUN_NAME, target.name):
        raise UserError(f"to={target} must end in one plain folder name: letters, digits and . _ = , + - only")


def make_run(
    config: TrainConfig,
    target: Path,
    *,
    write_model: Callable[[Path], None],
    model_bytes: int,
    tokenizer_file: Path | None,
    origin: Mapping[str, Any],
    steps: int,
) -> None:
    """Write the run's folder aside and rename it to `target`: it is there whole, or not at all.

    write_model is handed the path of the safetensors file to write, of about model_bytes. tokenizer_file: None for plain
    bytes. origin is JSON-able; steps: optimizer steps behind the weights, 0 where nobody knows. Raises UserError when
    `target` exists and is not an empty folder, or cannot be written.
    """
    check_target(target)
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        save_run_config(config, aside)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, aside / "tokenizer.json")
        save_weights(aside / "checkpoints", write_model=write_model, model_bytes=model_bytes, state={"step": steps})
        write_json(aside / ORIGIN_FILE, origin)
        os.replace(aside, target)
    except OSError as error:
        raise UserError(f"to={target} cannot be written ({error.strerror}): choose another folder") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def score(run: Path, *, tokens: int, device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """Evaluate the validation split as training does at its end, and write summary.json, which makes the run finished.

    tokens: trained on before, 0 where nobody knows. Returns the summary. Raises UserError when the data is not to be had.
    """
    trained = load_trained(run, device=device, precision=precision, execution=EXECUTION)
    config = trained.config
    data = prepare(
        config.dataset,
        config.tokenizer,
        Path(config.data_dir),
        tokenizer_file=trained.tokenizer_file,
        for_training=False,
    )
    result = validate(trained.model, config, data, trained.tokenizer, precision=precision, device=device, progress=True)
    facts, origin = model_facts(trained.model, config), read_json(run / ORIGIN_FILE)
    with open_run_tracker(
        config,
        config.tracking,
        run,
        run_config=dataclasses.asdict(config) | {"origin": origin},
        run_id=None,
        metrics_bytes=0,
    ) as tracker:
        tracker.log(trained.step, tokens, facts.metrics() | split_metrics(result))
        summary = run_summary(
            config, facts=facts, data=data, result=result, tokens=tokens, steps=trained.step, train_loss=None,
            tokens_per_second=None, seconds=0.0, kernel=trained.kernel, device=device, precision=precision, compiled=False,
            wandb_id=tracker.run_id,
        ) | {"origin": origin}  # fmt: skip
        tracker.summary(summary)
    write_json(run / "summary.json", summary)
    return summary
