"""A finished run scored on a split: what eval_model.py does for each run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.build import build_model
from harness.comparison import cache_label
from harness.config import load_run_config
from harness.data import prepare
from harness.errors import UserError
from harness.evaluation.cache_size import measure_cache
from harness.evaluation.evaluate import CacheChoice, evaluate_model
from harness.evaluation.extras import Subject, measure_extras
from harness.evaluation.perplexity import SEGMENT_TOKENS, Segments, SplitResult
from harness.run import commit, read_json, write_json
from harness.schema import EvalConfig
from harness.session import TrainedModel, decode_path, load_trained, open_run_tracker
from harness.training.device import select_device, select_precision
from modeling.attention import EXECUTION
from modeling.attention.cache import DTYPES
from modeling.gpt import GPT

# What an evaluation's record takes over from the training's summary.
CARRIED = ("name", "attention", "model", "seed", "data_seed", "parameters", "tokens", "steps", "tokens_per_second",
           "setup_hash", "tokenizer_fingerprint", "training_flops_per_token")  # fmt: skip


def score_run(run: Path, config: EvalConfig) -> tuple[dict[str, Any], SplitResult]:
    """Rebuild the model from the run's own configuration and score the split.

    Without a cache the result holds the split's segments, and the record the extras; through a cache there are neither,
    for they would be the plain model's. Raises UserError when the split is missing or the run's data is not what it was
    trained on.
    """
    summary = read_json(run / "summary.json")
    if lacking := [key for key in (*CARRIED, "data_fingerprint", "wandb_id") if key not in summary]:
        raise UserError(
            f"{run / 'summary.json'} lacks {', '.join(lacking)}: delete it, and the command that trained the run "
            f"writes it again from the last checkpoint"
        )
    device = select_device(config.device)
    precision = select_precision(config.precision, device)
    trained = load_trained(run, device=device, precision=precision, execution=config.attention)
    if trained.step != summary["steps"]:
        raise UserError(
            f"the last checkpoint of {run} (step {summary['steps']}) is damaged or missing, so that the trained model is not "
            f"there: delete {run / 'summary.json'}, and the command that trained the run makes it again from "
            f"{trained.checkpoint}"
        )
    dataset = config.dataset or trained.config.dataset
    data = prepare(
        dataset, trained.config.tokenizer, Path(config.data_dir), tokenizer_file=trained.tokenizer_file,
        for_training=False,
    )  # fmt: skip
    if config.split not in data.splits:
        raise UserError(f"split={config.split} is not in dataset={dataset.name}; choose from {', '.join(data.splits)}")
    if config.dataset is None and data.fingerprint != summary["data_fingerprint"]:
        raise UserError(
            f"the data of dataset={dataset.name} is not what {run.name} was trained on; bring that data back, or name "
            f"the corpus to evaluate on with dataset=..."
        )
    choice = CacheChoice(DTYPES[config.cache.dtype], config.cache.window, config.cache.sinks)
    cache = measure_cache(trained.model, dtype=choice.dtype, window=choice.window, sinks=choice.sinks)
    through = config.cache.through or choice.window is not None or choice.dtype.itemsize == 1
    mha_elements = 2 * trained.config.model.n_heads * trained.config.model.head_dim

    segment_tokens = None if through else SEGMENT_TOKENS
    started = time.perf_counter()

    def score(through: CacheChoice | None) -> SplitResult:
        return evaluate_model(
            trained.model, data.splits[config.split], end_of_text=data.end_of_text, decode=trained.tokenizer.decode,
            stride_fraction=config.stride_fraction, batch_size=config.batch_size, precision=precision, device=device,
            per_document=config.per_document, max_tokens=config.max_tokens, progress=True, through=through,
            segment_tokens=segment_tokens,
        )  # fmt: skip

    plain = score(None)
    result = score(choice) if through else plain
    record = {key: summary[key] for key in CARRIED} | {
        "trained_on": trained.config.dataset.name,
        "dataset": dataset.name,
        "data_fingerprint": data.fingerprint,
        "split": config.split,
        "per_document": config.per_document,
        "stride_fraction": config.stride_fraction,
        "max_tokens": config.max_tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "word_perplexity": result.word_perplexity,
        "bits_per_byte": result.bits_per_byte,
        "evaluated_tokens": result.tokens,
        "evaluated_bytes": result.bytes,
        "evaluated_words": result.words,
        "loss_by_position": result.loss_by_position,
        "through_cache": through,
        "loss_without_cache": plain.loss,
        "perplexity_without_cache": plain.perplexity,
        "bits_per_byte_without_cache": plain.bits_per_byte,
        "cache_bytes_per_token": cache.bytes_per_token,
        "cache_dtype": config.cache.dtype,
        "cache_window": choice.window,
        "cache_sinks": choice.sinks,
        "cache_context": cache.context,
        "cache_bytes_at_context": cache.bytes_at_context,
        "cache_elements_per_token_per_layer": cache.elements_per_token_per_layer,
        "cache_ratio_to_mha": cache.elements_per_token_per_layer / mha_elements,
        "seconds": time.perf_counter() - started,
        "kernel": trained.kernel,
        "decode": decode_path(trained.model, trained.model.max_seq_len) if through else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(precision).removeprefix("torch."),
        "checkpoint": trained.checkpoint,
        "commit": commit(),
    }
    started = time.perf_counter()
    subject = Subject(
        model=trained.model, longer=lambda max_seq_len: lengthened(trained, max_seq_len), split=data.splits[config.split],
        end_of_text=data.end_of_text, encode=trained.tokenizer.encode, decode=trained.tokenizer.decode,
        dataset=dataset.name, precision=precision, device=device, batch_size=config.batch_size,
        max_tokens=min(config.extras_max_tokens, config.max_tokens or config.extras_max_tokens),
    )  # fmt: skip
    record["extras"] = measure_extras(subject, [] if through else config.extras)
    record["extras_seconds"] = time.perf_counter() - started
    return record, result


def lengthened(trained: TrainedModel, max_seq_len: int) -> GPT | None:
    """A run's weights in a model of another max_seq_len, computed likewise; None where a table of positions ends."""
    if trained.model.position_embedding is not None:
        return None
    first = trained.model.attentions[0]
    plain = dataclasses.replace(trained.config, attention=trained.config.attention | EXECUTION)
    model = build_model(plain, trained.model.vocab_size, max_seq_len=max_seq_len)
    model.to(trained.model.embedding.weight.device).load_state_dict(trained.model.state_dict())
    model.set_execution(**{key: getattr(first, key) for key in EXECUTION})
    return model.eval()


def keep_record(run: Path, record: dict[str, Any], config: EvalConfig, segments: Segments | None) -> None:
    """Store an evaluation in the run and in its W&B run. Raises UserError when the run's folder cannot be written.

    The record goes to evaluations/NAME.json, its segments to segments/NAME.json.
    """
    name = record_name(record)
    try:
        write_json(run / "evaluations" / f"{name}.json", record)
        if segments is not None:
            kept = {"record": name, "segment_tokens": SEGMENT_TOKENS} | dataclasses.asdict(segments)
            write_json(run / "segments" / f"{name}.json", kept)
    except OSError as error:
        raise UserError(
            f"the record of this evaluation cannot be stored in {run} ({error.strerror}): make the folder writable, or "
            f"copy the run to one that is"
        ) from None
    trained = load_run_config(run)
    with open_run_tracker(
        trained, config.tracking, run, run_config=dataclasses.asdict(trained),
        run_id=read_json(run / "summary.json")["wandb_id"], metrics_bytes=None,
    ) as tracker:  # fmt: skip
        tracker.summary(dashboard_figures(record))


def dashboard_figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a dashboard shows of an evaluation: eval/corpus/split/loss and so on."""
    label = [cache_label(record)] if record["through_cache"] else []
    place = "/".join(["eval", record["dataset"], record["split"], *label])
    return {f"{place}/{key}": record[key] for key in ("loss", "perplexity", "word_perplexity", "bits_per_byte")}


def record_name(record: dict[str, Any]) -> str:
    """dataset-split-hash: the same evaluation done again replaces its file, another one stands beside it."""
    shaping = ("data_fingerprint", "cache_dtype", "precision", "per_document", "stride_fraction", "max_tokens",
               "through_cache", "cache_window", "cache_sinks")  # fmt: skip
    digest = hashlib.sha256(json.dumps([record[key] for key in shaping]).encode()).hexdigest()
    return f"{record['dataset']}-{record['split']}-{digest[:8]}"
