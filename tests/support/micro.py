"""Runs of a model so small that training it takes a second, through the entry scripts' own main()."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import eval_model
import train_model

SIZE = [
    "model.d_model=32",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.head_dim=16",
    "model.mlp_hidden=64",
    "model.max_seq_len=32",
    "batch_size=4",
]
STEPS = 6
WORDS = ("the", "a", "sea", "ship", "captain", "whale", "island", "storm", "réef", "said", "saw", "and", "of,")
TOKENS_PER_STEP = 4 * 32

# What other tools rely on in summary.json and in the JSON lines.
PROMISED = {
    "name",
    "attention",
    "model",
    "dataset",
    "seed",
    "parameters",
    "tokens",
    "steps",
    "loss",
    "perplexity",
    "bits_per_byte",
    "split",
    "cache_bytes_per_token",
    "cache_dtype",
    "cache_elements_per_token_per_layer",
    "tokens_per_second",
    "seconds",
    "commit",
}
# What differs between two runs that compute the same.
CLOCKS = {"seconds", "tokens_per_second", "peak_memory_bytes", "speed/tokens_per_second", "memory/peak_bytes", "finished_at"}


def write_corpus(path: Path, seed: int = 0, lines: int = 400) -> Path:
    """A text file of random words."""
    choice = random.Random(seed)
    text = "\n".join(" ".join(choice.choice(WORDS) for _ in range(12)) for _ in range(lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


class Workplace:
    """A corpus, prepared data and runs in one folder, and the entry scripts working there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.corpus = write_corpus(folder / "sea.txt")

    def places(self) -> list[str]:
        """Where things lie, and float32 on every machine: `auto` takes bfloat16 where the processor has it."""
        return [f"runs_dir={self.runs}", f"data_dir={self.folder / 'data'}", "tracking=none", "device=cpu", "precision=float32"]

    def overrides(self, *more: str) -> list[str]:
        """The command line of a micro run; later overrides come last and win."""
        given = {override.partition("=")[0] for override in more}
        plain = [
            *SIZE,
            f"budget.steps={STEPS}",
            "dataset=local",
            f"dataset.path={self.corpus}",
            "tokenizer=bytes",
            *self.places(),
        ]
        return [override for override in plain if override.partition("=")[0] not in given] + list(more)

    def train(self, name: str, *more: str) -> Path:
        """Train a run to its end; its folder."""
        assert train_model.main(self.overrides(f"name={name}", *more)) == 0
        return self.runs / name

    def evaluate(self, *more: str) -> int:
        return eval_model.main([*self.places(), *more])


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rows_of_steps(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as W&B has it: one row a step."""
    rows: dict[int, dict[str, Any]] = {}
    for row in metrics_of(run):
        rows.setdefault(row["step"], {}).update(row)
    return list(rows.values())


def without_clocks(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in CLOCKS}


def json_lines(output: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines of an output."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def records(output: str) -> list[dict[str, Any]]:
    """The whole records whose files the JSON lines of an output name; each line is short and says what they say."""
    found = []
    for line in json_lines(output):
        record: dict[str, Any] = json.loads(Path(line["record"]).read_text())
        assert len(json.dumps(line)) <= 1024
        assert all(record[key] == value for key, value in line.items() if key in record)
        found.append(record)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
