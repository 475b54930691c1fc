"""A study's folder as scripts/run_study.py leaves it, with figures that are drawn from a known truth instead of trained."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.report.findings import Findings
from harness.report.sections import sections
from harness.report.tables import study_markdown
from harness.report.write import as_dict
from harness.study.results import load_results

TOKENS = 2_000_000
SWEEP_TOKENS = 500_000
STEPS = 20  # validations of a run
BYTES_PER_TOKEN = 3.5
SHARED_LR = 0.005
HALF = 2.4  # bits per byte and the accuracy of answers add up to this
LENGTH = 256  # of a context in training
SEED_DEVIATION, NOISE_DEVIATION = 0.0005, 0.002  # bits per byte: of what a seed does to all arms, and to one run


@dataclass(frozen=True)
class Truth:
    """An arm: what it costs and what it is worth."""

    family: str
    bits_per_byte: float
    cache: int  # bytes per token
    parameters: int = 1_328_256
    best_lr: float = 0.006
    level: str | None = None
    reference: bool = False
    beyond: bool = True  # positions reach beyond the training length
    milliseconds: float = 2.0  # of a decoded token at context 1,024 and batch 1


ARMS = {
    "mha": Truth("mha", 1.8208, 2048, reference=True, milliseconds=2.4),
    "gqa": Truth("gqa", 1.8252, 1024, 1_324_160, milliseconds=2.1),
    "mqa": Truth("mqa", 1.8330, 512, best_lr=0.004, milliseconds=1.9),
    "mla": Truth("mla", 1.8233, 640, 1_324_416, best_lr=0.007, milliseconds=2.6),
    "mla_plain": Truth("mla", 1.9027, 512, best_lr=0.0045, beyond=False, milliseconds=2.2),
}
CONTRASTS = [["mla", "gqa"], ["mla", "mqa"], ["mla", "mla_plain"]]
STAIRCASE = ["mha", "gqa", "mqa", "mla_plain", "mla"]
MANY = {
    f"rank_{i}_of_many_arms" if i % 3 else f"r{i}": Truth("mla", 1.82 + 0.002 * (7 * i % 14), 512 + 64 * (5 * i % 14))
    for i in range(14)
}
LEVELS = {
    f"{family}_{level}": Truth(family, 1.84 - 0.01 * i + 0.003 * j, level, level=f"{level:,} bytes")
    for i, level in enumerate((512, 1024, 1536))
    for j, family in enumerate(("gqa", "mla", "mqa"))
}


def write_study(
    folder: Path,
    arms: Mapping[str, Truth] = ARMS,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    contrasts: Sequence[Sequence[str]] = CONTRASTS,
    unfinished: Collection[tuple[str, int]] = (),
    staircase: Sequence[str] = (),
    sweep: bool = False,
    sweep_tokens: int = SWEEP_TOKENS,
    decode: bool = False,
    extras: bool = True,
    segments: int = 150,
    failures: Sequence[Mapping[str, str]] = (),
    metric: str = "bits_per_byte",
    question: str = "What does each variant cost in quality and cache?",
    sources: Mapping[str, str] | None = None,
    margin: float | None = None,
) -> Path:
    """Write study.json and the runs below `folder`; runs in `unfinished` (arm, seed) have not ended.

    sources: arm -> the arm whose run of the same seed its weights come from. Returns the folder.
    """
    tuned = {arm: float(f"{truth.best_lr:.3g}") for arm, truth in arms.items()}
    rates = tuned if sweep else dict.fromkeys(arms, SHARED_LR)
    specs = [_spec(arm, rates[arm], seed, TOKENS, None) for seed in seeds for arm in arms]
    for spec in specs if sources else ():
        source = sources.get(spec["arm"]) if sources else None
        spec["source"] = source and _spec(source, rates[source], spec["seed"], TOKENS, None)["name"]
    declared = {"arms": {arm: list(seeds) for arm in arms}, "contrasts": [list(pair) for pair in contrasts], "margin": margin}
    budget = None if sweep_tokens == TOKENS else sweep_tokens
    sweep_specs = [_spec(arm, lr, 0, sweep_tokens, budget) for arm in arms for lr in (0.0025, 0.005, 0.01)] if sweep else []
    record = {
        "name": folder.name,
        "question": question,
        "command": f"python scripts/run_study.py study={folder.name} tracking=none",
        "metric": metric,
        "base": ["model=tiny"],
        "contrasts": declared["contrasts"],
        "margin": margin,
        "staircase": list(staircase),
        "arms": {arm: _arm(arm, truth, arms) for arm, truth in arms.items()},
        "shared_lr": SHARED_LR,
        "chosen_lr": tuned if sweep else {},
        "runs": specs,
        "sweep": sweep_specs,
        "failures": [dict(failure) for failure in failures],
        "history": [{"at": "2026-11-29T12:00:00+00:00", "results": 0, **declared}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(record))
    for spec in [*specs, *sweep_specs]:
        if (spec["arm"], spec["seed"]) not in unfinished or spec in sweep_specs:
            _write_run(
                folder / spec["name"],
                spec,
                arms[spec["arm"]],
                extras=extras,
                segments=segments,
                answers=metric == "answer_accuracy",
            )
    if decode:
        rows = [
            {
                "arm": arm,
                "context": context,
                "batch": batch,
                "milliseconds": ms,
                "low": 0.97 * ms,
                "high": 1.05 * ms,
                "device": "cpu",
                "path": "absorbed" if truth.family == "mla" else "auto",
            }
            for arm, truth in arms.items()
            for context in (256, 1024)
            for batch in (1, 8)
            for ms in [truth.milliseconds * (0.8 + 0.2 * context * truth.cache * batch / 2**21)]
        ]
        (folder / "decode.json").write_text(json.dumps({"rows": rows}))
    return folder


def told(folder: Path) -> tuple[str, dict[str, Any]]:
    """The Markdown and the JSON of a study's report made now, for which nothing is drawn."""
    findings = Findings(load_results(folder))
    content: dict[str, Any] = json.loads(json.dumps(as_dict(findings)))
    return study_markdown(findings, sections(findings)), content


def _spec(arm: str, lr: float, seed: int, tokens: int, budget: int | None) -> dict[str, Any]:
    short = "" if budget is None else f"-tokens{budget}"
    name = f"{arm}-lr{lr:.3g}{short}-seed{seed}".replace("/", "_")
    return {"arm": arm, "lr": lr, "seed": seed, "tokens": tokens, "budget": budget, "setup_hash": arm, "name": name}


def _arm(name: str, truth: Truth, arms: Mapping[str, Truth]) -> dict[str, Any]:
    first = next(iter(arms))
    target = arms[first].parameters
    match = (
        []
        if name == first
        else [
            {
                "quantity": "params",
                "to": first,
                "vary": "model.mlp_hidden",
                "value": 344,
                "target": target,
                "achieved": truth.parameters,
                "mismatch": truth.parameters / target - 1,
            }
        ]
    )
    return {
        "family": truth.family,
        "level": truth.level,
        "reference": truth.reference,
        "overrides": [f"attention={name}"],
        "setup_hash": name,
        "quantities": {},
        "match": match,
    }


def _write_run(run: Path, spec: Mapping[str, Any], truth: Truth, *, extras: bool, segments: int, answers: bool) -> None:
    chance = random.Random(f"{spec['arm']} {spec['seed']}")
    of_seed = random.Random(f"seed {spec['seed']}").gauss(0, SEED_DEVIATION)
    detuned = 0.02 * math.log(spec["lr"] / truth.best_lr) ** 2 + 0.08 * math.log(TOKENS / spec["tokens"])
    bits = truth.bits_per_byte + of_seed + chance.gauss(0, NOISE_DEVIATION) + detuned
    loss = bits * math.log(2) * BYTES_PER_TOKEN
    places = [spec["tokens"] * step // STEPS for step in range(STEPS + 1)]
    curve = [loss + 0.9 * (1 - place / places[-1]) ** 2 + 3.2 * math.exp(-9 * place / places[-1]) for place in places]
    lines = [
        {"step": i, "tokens": place, "val/loss": value, "val/bits_per_byte": value / math.log(2) / BYTES_PER_TOKEN}
        for i, (place, value) in enumerate(zip(places, curve, strict=True))
    ]
    blocks = {"embedding": 524_288, "attention": 262_144, "mlp": truth.parameters - 787_584, "norms": 1152, "head": 0}
    summary = {
        "name": run.name,
        "attention": spec["arm"],
        "model": "tiny",
        "dataset": "stdlib",
        "seed": spec["seed"],
        "data_seed": spec["seed"],
        "parameters": truth.parameters,
        "parameters_by_block": {**blocks, "total": truth.parameters},
        "training_flops_per_token": 7 * truth.parameters,
        "tokens": spec["tokens"],
        "steps": spec["tokens"] // 2048,
        "loss": loss + 0.01,
        "perplexity": math.exp(loss + 0.01),
        "bits_per_byte": bits + 0.004,
        "split": "validation",
        "cache_bytes_per_token": truth.cache,
        "cache_dtype": "bfloat16",
        "cache_ratio_to_mha": truth.cache / 2048,
        "tokens_per_second": 20_000.0,
        "seconds": 100.0,
        "setup_hash": spec["setup_hash"],
        "data_fingerprint": "d" * 64,
        "tokenizer_fingerprint": "7" * 64,
        "kernel": "sdpa_flash",
        "device": "cpu",
        "precision": "bfloat16",
        "compiled": False,
        "torch": "2.13.0",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "wandb_id": None,
    }
    record = {
        "dataset": "stdlib",
        "split": "test",
        "through_cache": False,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits,
        "evaluated_tokens": 50_000,
        "data_fingerprint": "d" * 64,
        "cache_bytes_per_token": truth.cache,
        "loss_by_position": [[low, 2 * low - 1, loss + 0.12 * (8 - i)] for i, low in enumerate(2**k for k in range(9))],
        "extras": _extras(truth, bits, chance, answers=answers) if extras else {},
    }
    (run / "evaluations").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(_config(spec, truth)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evaluations" / "stdlib-test-00000000.json").write_text(json.dumps(record))
    (run / "summary.json").write_text(json.dumps(summary))
    if segments:
        text = random.Random("text")
        hard = [text.gauss(1, 0.15) for _ in range(segments)]
        sizes = [7000 + text.randrange(400) for _ in range(segments)]
        nats = [size * bits * math.log(2) * h * chance.gauss(1, 0.004) for size, h in zip(sizes, hard, strict=True)]
        (run / "segments").mkdir()
        kept = {
            "record": "stdlib-test-00000000",
            "segment_tokens": 2048,
            "tokens": [2048] * segments,
            "nats": nats,
            "bytes": sizes,
            "documents": [8 * i // segments for i in range(segments)],
        }
        (run / "segments" / "stdlib-test-00000000.json").write_text(json.dumps(kept))


def _extras(truth: Truth, bits: float, chance: random.Random, *, answers: bool) -> dict[str, Any]:
    loss = bits * math.log(2) * BYTES_PER_TOKEN
    bins = [(1, 128, 1.02), (129, 256, 1.0), (257, 512, 1.0 + 0.02 * chance.random()), (513, 1024, 1.1 + 0.1 * chance.random())]
    beyond = {
        "training_length": LENGTH,
        "longest_context": 4 * LENGTH,
        "targets": 4096,
        "in_length_loss": loss - 0.1,
        "ratio_2x": bins[2][2],
        "ratio_4x": bins[3][2],
        "bins": [
            {"low": low, "high": high, "loss": ratio * (loss - 0.1), "tokens": 4096, "ratio": ratio}
            for low, high, ratio in bins
        ],
    }
    repeats = {
        "n": 5,
        "count": 900,
        "share": 0.09,
        "first_loss": loss + 1,
        "repeat_loss": loss - 2 + 0.1 * chance.random(),
        "gain": 3.0,
        "distance": 75.0,
        "scored_tokens": 10_000,
    }
    latents = {
        "sampled_tokens": 8192,
        "width": 64,
        "effective_rank": 25 + chance.random(),
        "key_effective_rank": 38.0,
        "value_effective_rank": 35.0,
        "rotated_share": 0.62,
        "layers": [],
    }
    # As good as the loss is low, so that a study of it must read as the same study of bits per byte does.
    right = {"accuracy": HALF - bits, "chance": 0.125, "newest": None, "by_pairs": []} if answers else None
    recall = {
        "passkey": [{"length": length, "accuracy": 0.5 * chance.random(), "gain": 1.5, "prompts": []} for length in (128, 256)],
        "copying": [{"length": 256, "accuracy": 0.8, "gain": 2 + chance.random()}],
        "answers": right,
    }
    return {
        "beyond": beyond if truth.beyond else None,
        "repeats": repeats,
        "recall": recall,
        "latents": latents if truth.family == "mla" else None,
    }


def _config(spec: Mapping[str, Any], truth: Truth) -> dict[str, Any]:
    attention: dict[str, Any] = {"name": spec["arm"], "mechanism": truth.family}
    if truth.family == "mla":
        attention |= {"kv_lora_rank": 64, "q_lora_rank": None}
    return {
        "name": spec["name"],
        "runs_dir": "runs",
        "seed": spec["seed"],
        "data_seed": spec["seed"],
        "batch_size": 8,
        "attention": attention,
        "model": {"name": "tiny", "max_seq_len": LENGTH, "mlp_hidden": 344},
        "optimizer": {"name": "adamw", "lr": spec["lr"]},
        "tracking": {"name": "none"},
    }
