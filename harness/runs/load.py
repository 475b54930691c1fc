"""A trained model from a run: rebuilt from its configuration and a checkpoint, and how it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.config.build import build_model, check_weights
from harness.config.run_config import load_run_config
from harness.config.schema import TrainConfig
from harness.data import Tokenizer
from harness.errors import UserError, as_user_error
from harness.evaluation.losses import CapturedLosses, TokenLosses
from harness.runs.folder import finished
from harness.runs.records import RunSummary, read_summary
from harness.runs.text_settings import TheirText, load_text
from harness.training.checkpoint import Checkpoint, best_checkpoint, latest_checkpoint, load_checkpoint
from harness.training.step import select_capture
from modeling.attention import EXECUTION, attends, names_kernel, set_execution
from modeling.attention.output import decode_kernel
from modeling.attention.quantisation import CacheFormat, as_format
from modeling.gpt import GPT
from modeling.kernels.attend import SINK_WIDTH, choose_backend
from modeling.kernels.decode_kernels import (
    DELTA_RULES,
    EXPLICIT,
    OTHERS,
    check_dtype,
    check_gradient,
    check_kernel,
    check_widths,
)

CHECKPOINTS = ("last", "best")


@dataclass
class TrainedModel:
    """A run's model as a checkpoint left it, in evaluation mode, and what the run says of itself.

    summary: empty of a run that is not finished. fingerprint: of the data that it learned from, as far as it says.
    """

    run: Path
    config: TrainConfig
    summary: RunSummary
    fingerprint: str | None
    model: GPT
    tokenizer: Tokenizer
    tokenizer_file: Path | None  # None: plain bytes
    kernel: str
    checkpoint: str
    step: int
    text: TheirText | None = None  # of a checkpoint from elsewhere


def trained_summary(run: Path, *needed: str) -> RunSummary:
    """A finished run's summary with what `trained_checkpoint` needs; empty of a run that is not finished."""
    return read_summary(run, *dict.fromkeys((*needed, "steps"))) if finished(run) else {}


def trained_checkpoint(run: Path, summary: RunSummary) -> Checkpoint | None:
    """The newest whole checkpoint. Raises UserError where it is not the one that a finished run's records are about."""
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is not None and summary and checkpoint.state["step"] != summary["steps"]:
        raise UserError(
            f"the last checkpoint of {run} (step {summary['steps']}) is damaged or missing, so that the trained model is not "
            f"there: delete {run / 'summary.json'}, and the command that trained the run makes it again from "
            f"{checkpoint.path.name}"
        )
    return checkpoint


def load_trained(
    run: Path,
    *,
    device: torch.device,
    precision: torch.dtype,
    execution: Mapping[str, Any],
    which: str = "last",
    needed: Collection[str] = (),
) -> TrainedModel:
    """Rebuild the model from the configuration inside the run, computed as `execution` says (backend, decode, kernel).

    which: last, the newest checkpoint, or best, the one that validated best. needed: what the caller reads of a finished
    run's summary. Raises UserError when the run holds no such checkpoint, or when its variant cannot be computed so.
    """
    if which not in CHECKPOINTS:
        raise UserError(f"checkpoint={which} is unknown: choose last or best")
    config, summary = load_run_config(run), trained_summary(run, *needed)
    tokenizer_file = run / "tokenizer.json" if config.tokenizer.name != "bytes" else None
    tokenizer = Tokenizer.load(tokenizer_file, remedy="restore it, or copy the one of the data that the run learned from")
    text = load_text(run)
    if text is not None:
        tokenizer.speak_as(text.opening, text.stops)
    # How it was computed in training says nothing of how it is used.
    plain = dataclasses.replace(config, attention=config.attention | EXECUTION)
    checkpoint = trained_checkpoint(run, summary) if which == "last" else best_checkpoint(run / "checkpoints")
    if checkpoint is None:
        if which == "best":
            raise UserError(
                f"{run} holds no best checkpoint, which a training with checkpoints.keep_best=true keeps: take checkpoint=last"
            )
        raise UserError(f"{run} holds no checkpoint; the command that started it continues it, or trains it")
    check_weights(plain, tokenizer.vocab_size, checkpoint.weights)
    model = build_model(plain, tokenizer.vocab_size).to(device)
    load_checkpoint(checkpoint, model=model, optimizer=None)
    check_finite(model, checkpoint.path)
    kernel = pin_execution(model, execution, device=device, precision=precision)
    fingerprint = (summary or checkpoint.state).get("data_fingerprint")
    known = run, config, summary, fingerprint if isinstance(fingerprint, str) else None
    name, step = checkpoint.path.name, checkpoint.state["step"]
    return TrainedModel(*known, model.eval(), tokenizer, tokenizer_file, kernel, name, step, text)


def check_finite(model: GPT, checkpoint: Path) -> None:
    """Raises UserError for weights that are not: attention hides them, some kernels give 0 for a NaN."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(
                f"{checkpoint} holds weights that are not finite ({name}): use an earlier checkpoint, or train anew"
            )


def token_losses(model: GPT, *, capture: str, precision: torch.dtype, device: torch.device, processes: int = 1) -> TokenLosses:
    """Replayed where `capture` (auto | on | off) and the device allow it. Raises UserError for capture=on where they do not."""
    if select_capture(capture, device, processes=processes):
        return CapturedLosses(model, precision=precision, device=device)
    return TokenLosses(model, precision=precision, device=device)


def pin_execution(
    model: GPT, execution: Mapping[str, Any], *, device: torch.device, precision: torch.dtype, trains: bool = False
) -> str:
    """Choose backend, decode path and kernel once, set them in every layer and return what computes attention.

    Where layers differ, each has the backend that fits it, and the name is all of theirs; layers that attend to no tokens need
    none, and are named where a kernel was chosen for them. trains: gradients are wanted too. Raises UserError if one of them
    cannot run.
    """
    chosen: dict[tuple[Any, ...], str] = {}
    with as_user_error():
        check_kernel(execution["kernel"], device)
        model.set_execution(**{key: execution[key] for key in EXECUTION})
        rules = [layer.rule_kernel(precision, device) for layer in model.attentions if hasattr(layer, "rule_kernel")]
        rules = [kernel for kernel in rules if kernel in DELTA_RULES]
        for kernel in set(rules):
            check_dtype(kernel, precision, DELTA_RULES)
            if trains:
                check_gradient(kernel, device)
        for layer in filter(attends, model.attentions):
            qk_width = layer.qk_width + (0 if getattr(layer, "sink_logits", None) is None else SINK_WIDTH)
            shape = (layer.n_heads, layer.n_kv_heads, qk_width, layer.v_head_dim, layer.dropout)
            if shape not in chosen:
                chosen[shape] = choose_backend(
                    execution["backend"],
                    n_heads=layer.n_heads,
                    n_kv_heads=layer.n_kv_heads,
                    qk_width=qk_width,
                    v_width=layer.v_head_dim,
                    dropout=layer.dropout,
                    device=device,
                    dtype=precision,
                )
            layer.backend = chosen[shape]
            if names_kernel([layer], layer.kernel):
                check_dtype(layer.kernel, precision, EXPLICIT)
            elif layer.kernel in OTHERS:
                check_widths(layer.kernel, layer.latent_widths[0], layer.qk_rope_head_dim)
    return ", ".join(dict.fromkeys([*chosen.values(), *rules])) or "none"


def compute_like(model: GPT, other: GPT) -> None:
    """Compute each layer of a model as that of another one is, whose execution has been pinned."""
    for layer, pinned in zip(model.attentions, other.attentions, strict=True):
        set_execution(layer, **{key: getattr(pinned, key) for key in EXECUTION})


def decode_path(
    model: GPT,
    new_tokens: int | None = None,
    *,
    cache: torch.dtype | CacheFormat = torch.bfloat16,
    precision: torch.dtype = torch.float32,
    window: int | None = None,
) -> str:
    """How calls through such a cache are computed, in words; with new_tokens, a call of so many tokens a row."""
    kept = as_format(cache)
    device = model.embedding.weight.device
    paths = []
    for layer in model.attentions:
        kernel = None
        if layer.decode_paths != ("auto",):
            with torch.no_grad():
                kernel = layer.kernel_for(kept.read_dtype(precision), device, window)
        elif attends(layer):
            with torch.no_grad():
                kernel = decode_kernel(layer, precision, device)
        paths.append(_path_of(layer, model, new_tokens, kernel))
    return "; ".join(dict.fromkeys(paths))


def _path_of(layer: Any, model: GPT, new_tokens: int | None, kernel: str | None) -> str:
    if layer.decode_paths == ("auto",):
        cached_as = str(getattr(layer, "cached_as", "keys and values as they are cached"))
        if kernel in (None, "torch") or new_tokens not in (None, 1):
            return cached_as
        return f"{cached_as} ({kernel} kernel{'' if new_tokens == 1 else ' for one new token, torch for more'})"
    if new_tokens is not None:  # other kernels than torch's compute one new token alone
        kernel = kernel if new_tokens == 1 else "torch"
        return f"absorbed ({kernel} kernel)" if layer.absorbs(new_tokens) else "expanded"
    for_more = "" if kernel == "torch" else " for one new token, torch for more"
    absorbed = f"absorbed ({kernel} kernel{for_more})"
    if layer.decode == "auto" and layer.absorbs(1) and layer.absorbs_up_to < model.max_seq_len:
        return f"{absorbed} up to {layer.absorbs_up_to:,} new tokens a call, expanded above"
    return absorbed if layer.absorbs(1) else "expanded"
