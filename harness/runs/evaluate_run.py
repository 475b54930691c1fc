"""A finished run scored on a split: what eval_model.py does for each run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from harness.config.build import build_model
from harness.config.identity import corpus_name
from harness.config.schema import EvalConfig, TrainConfig
from harness.data import PreparedData, VerifiedSplit, prepare
from harness.errors import UserError
from harness.evaluation.cache_size import measure_cache
from harness.evaluation.evaluate import CacheChoice, evaluate_model
from harness.evaluation.losses import TokenLosses
from harness.evaluation.metric import SCORES
from harness.evaluation.perplexity import SEGMENT_TOKENS, Scoring, SplitResult
from harness.evaluation.probes import Subject, measure_extras, with_floors
from harness.files.folders import refuse_links
from harness.runs.corpus import data_of
from harness.runs.folder import finished, storing
from harness.runs.kind import PLAIN_CACHE, PROTOCOL
from harness.runs.load import TrainedModel, compute_like, decode_path, load_trained, token_losses
from harness.runs.provenance import commit, now
from harness.runs.records import Evaluation, Extras, RunSummary, SegmentRecord, Trained, save
from harness.runs.summary import Computation
from harness.runs.to_dashboard import dashboard_figures, open_run_tracker
from harness.training.device import select_device, select_precision
from modeling.attention import EXECUTION
from modeling.attention.quantisation import cache_format
from modeling.gpt import GPT

CARRIED = (*Trained.__annotations__, "parameters", "training_flops_per_token")  # from the training's summary


@dataclass(frozen=True)
class Scored:
    """A run's evaluation, and what belongs to it of the run: its model is no longer kept."""

    config: TrainConfig
    summary: RunSummary
    record: Evaluation
    result: SplitResult


def score_run(run: Path, config: EvalConfig) -> Scored:
    """Rebuild the model from the run's own configuration and score the split.

    Without a cache the result holds the split's segments. Through one the record also says how far the cache moves the
    distributions of the next token, and the extras are measured through it and without it. Raises UserError when the split is
    missing or the run's data is not what it was trained on.
    """
    refuse_links(run)
    device = select_device(config.device)
    computed: dict[str, Any] = {"device": device, "precision": select_precision(config.precision, device)}
    needed = (*CARRIED, "data_fingerprint", "wandb_id")
    trained = load_trained(run, **computed, execution=config.attention, needed=needed)
    own, dataset = trained.config, config.dataset or trained.config.dataset
    data = _text(config, trained)
    split = data.verified(config.split)
    losses = token_losses(trained.model, capture=config.capture, **computed)
    through, cache = _cache(trained, config)

    started = time.perf_counter()
    scoring = Scoring(
        config.stride_fraction,
        config.batch_size,
        per_document=config.per_document,
        max_tokens=config.max_tokens,
        segment_tokens=SEGMENT_TOKENS if through is None else None,
        progress=True,
    )
    result = evaluate_model(losses, split, trained.tokenizer, scoring, through=through)
    computation = Computation(**computed, kernel=trained.kernel)
    record = cast(Evaluation, {key: value for key, value in trained.summary.items() if key in CARRIED})
    record.update(
        {
            "trained_on": own.dataset.name,
            "dataset": dataset.name,
            "corpus": corpus_name(dataset),
            "data_fingerprint": data.fingerprint,
            "split": config.split,
            "per_document": config.per_document,
            "stride_fraction": config.stride_fraction,
            "max_tokens": config.max_tokens,
            **_figures(result),
            **cache,
            "seconds": time.perf_counter() - started,
            "kernel": computation.kernel,
            "decode": None if through is None else decode_path(trained.model, trained.model.max_seq_len),
            "device": computation.device_name,
            "precision": computation.precision_name,
            "checkpoint": trained.checkpoint,
            "commit": commit(),
        }
    )
    started = time.perf_counter()
    record["extras"] = plain = _extras(trained, losses, split, config, None)
    if through is not None:
        record["extras_without_cache"] = plain
        record["extras"] = with_floors(_extras(trained, losses, split, config, through), plain)
    record["extras_seconds"] = time.perf_counter() - started
    record["finished_at"] = now()
    return Scored(own, trained.summary, record, result)


def _cache(trained: TrainedModel, config: EvalConfig) -> tuple[CacheChoice | None, Evaluation]:
    """What everything is scored through, if anything, and what the record says of the cache."""
    shape = trained.config.model
    choice = CacheChoice(cache_format(config.cache.dtype), config.cache.window, config.cache.sinks)
    choice.check_window(shape.max_seq_len)
    size = measure_cache(trained.model, dtype=choice.dtype, window=choice.window, sinks=choice.sinks)
    through = choice if config.cache.scores else None
    record: Evaluation = {
        "through_cache": through is not None,
        **size.record(),
        "cache_dtype": config.cache.dtype,
        "cache_window": choice.window,
        "cache_sinks": choice.sinks,
        "cache_ratio_to_mha": size.elements_per_token_per_layer / (2 * shape.n_heads * shape.head_dim),
    }
    return through, record


def _figures(result: SplitResult) -> Evaluation:
    """What was scored, and beside it without the cache; without one that is the same."""
    plain, divergence = result.beside or (result, None)
    figures: Evaluation = {
        **result.scores(),
        "evaluated_tokens": result.tokens,
        "evaluated_bytes": result.bytes,
        "evaluated_words": result.words,
        "loss_by_position": [*result.loss_by_position],
        "cache_divergence": None if divergence is None else divergence.loss,
    }
    without = {f"{key}_without_cache": score.of(plain.scores()) for key, score in SCORES.items()}
    return cast(Evaluation, {**figures, **without})


def _text(config: EvalConfig, trained: TrainedModel) -> PreparedData:
    """The run's own, or that of another dataset in the run's tokens. Raises UserError where it lacks the split."""
    data_dir = Path(config.data_dir)
    if config.dataset is None:
        data = data_of(trained, data_dir, path=config.corpus_at)
    else:
        data = prepare(
            config.dataset, trained.config.tokenizer, data_dir, tokenizer_file=trained.tokenizer_file, for_training=False
        )
    if config.split not in data.splits:
        name = (config.dataset or trained.config.dataset).name
        raise UserError(f"split={config.split} is not in dataset={name}; choose from {', '.join(data.splits)}")
    return data


def _extras(
    trained: TrainedModel, losses: TokenLosses, split: VerifiedSplit, config: EvalConfig, through: CacheChoice | None
) -> Extras:
    subject = Subject(
        losses=losses,
        longer=lambda max_seq_len: lengthened(trained, max_seq_len),
        split=split,
        end_of_text=trained.tokenizer.end_of_text,
        encode=trained.tokenizer.encode,
        decode=trained.tokenizer.decode,
        dataset=(config.dataset or trained.config.dataset).name,
        batch_size=config.batch_size,
        max_tokens=min(config.extras_max_tokens, config.max_tokens or config.extras_max_tokens),
        through=through,
    )
    return cast(Extras, measure_extras(subject, config.extras))


def lengthened(trained: TrainedModel, max_seq_len: int) -> GPT | None:
    """A run's weights in a model of another max_seq_len, computed likewise; None where a table of positions ends."""
    if trained.model.position_embedding is not None:
        return None
    plain = dataclasses.replace(trained.config, attention=trained.config.attention | EXECUTION)
    model = build_model(plain, trained.model.vocab_size, max_seq_len=max_seq_len)
    model.to(trained.model.embedding.weight.device).load_state_dict(trained.model.state_dict())
    compute_like(model, trained.model)
    return model.eval()


def keep_record(run: Path, scored: Scored, config: EvalConfig) -> Path:
    """Store an evaluation in the run and in its W&B run; its file. Raises UserError when the folder cannot be written.

    The record goes to evaluations/NAME.json, its segments to segments/NAME.json.
    """
    record, segments = scored.record, scored.result.segments
    if not finished(run):  # it is not brought back
        raise UserError(f"{run} was removed while it was evaluated, and has no place for the record: put the run's folder back")
    name = record_name(record)
    file = run / "evaluations" / f"{name}.json"
    with storing("this evaluation", run):
        if segments is not None:  # before the record: one that is there is whole
            kept = {"record": name, "segment_tokens": SEGMENT_TOKENS} | dataclasses.asdict(segments)
            save(run / "segments" / f"{name}.json", SegmentRecord, kept)
        save(file, Evaluation, record)
    with open_run_tracker(
        scored.config, config.tracking, run, run_config=dataclasses.asdict(scored.config), run_id=scored.summary["wandb_id"]
    ) as tracker:
        tracker.summary(dashboard_figures(record, scored.summary))
    return file


def record_name(record: Evaluation) -> str:
    """dataset-split-hash: the same evaluation done again replaces its file, another one stands beside it."""
    # In this order, which the names of the files on disk hold.
    shaping = ("data_fingerprint", "cache_dtype", "precision", *PROTOCOL, *PLAIN_CACHE)
    digest = hashlib.sha256(json.dumps([dict(record)[key] for key in shaping]).encode()).hexdigest()
    return f"{record['dataset']}-{record['split']}-{digest[:8]}"
