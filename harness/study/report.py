"""A study's report in its folder: report.html, report.md, report.csv, report.json and figures/*.png."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.run import write_json, write_text
from harness.study.figures import save_figure
from harness.study.findings import Findings, Verdict, find
from harness.study.page import page
from harness.study.results import RunResult, StudyResults
from harness.study.sections import Section, Table, sections


def write_report(results: StudyResults, folder: Path) -> list[Path]:
    """Write all files of the report and return their paths; figures of an earlier report are removed.

    Raises UserError when no run has finished yet, or when the folder cannot be written.
    """
    findings = find(results)
    parts = sections(findings)
    try:
        figures = _save_figures(parts, folder / "figures")
        texts = {
            "report.html": page(findings),
            "report.md": as_markdown(findings, parts),
            "report.csv": as_csv(results),
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        names = [str(path.relative_to(folder)) for path in figures]
        write_json(folder / "report.json", as_dict(findings) | {"figures": names})
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder} ({error.strerror}): make the folder writable, or copy it "
                        f"to one that is") from None  # fmt: skip
    return [*(folder / name for name in texts), folder / "report.json", *figures]


def _save_figures(parts: list[Section], folder: Path) -> list[Path]:
    drawn = {f"{figure.name}.png": figure for section in parts for figure in section.figures}
    for old in folder.glob("*.png"):
        if old.name not in drawn:
            old.unlink()
    for name, figure in drawn.items():
        save_figure(figure, folder / name)
    return [folder / name for name in drawn]


# --- Markdown --------------------------------------------------------------------------------------------------------


def as_markdown(findings: Findings, parts: list[Section]) -> str:
    """The same report for a repository or a terminal."""
    results = findings.results
    lines = [f"# {_md(results.question)}", "", f"Study {_md(results.name)}.", ""]
    lines += [f"- **{_md(failure['run'])} failed:** {_md(failure['error'])}" for failure in results.failures]
    lines += [f"- **Note:** {_md(note)}." for note in findings.notes]
    for section in parts:
        lines += ["", f"## {_md(section.title)}", ""]
        lines += [part for text in section.words for part in (_md(text), "")]
        lines += [f"- {_md(point)}" for point in section.points]
        for figure in section.figures:
            lines += [
                "",
                f"![{_md(figure.title)}](figures/{figure.name}.png)",
                "",
                f"{_md(figure.title)}. {_md(figure.caption)}",
            ]
        for table in section.tables:
            lines += ["", *_md_table(table)]
        if section.code:
            lines += ["", "```sh", section.code, "```"]
        lines += [part for text in section.after for part in ("", _md(text))]
        lines += ["", *(f"- {_md(point)}" for point in section.more)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _md_table(table: Table) -> list[str]:
    lines = [f"**{_md(table.title)}**", ""] if table.title else []
    lines.append("| " + " | ".join(map(_md, table.columns)) + " |")
    lines.append("| " + " | ".join("---" if i in table.words else "---:" for i in range(len(table.columns))) + " |")
    for line in table.lines:
        cells = [_md(cell) for cell in line.cells]
        if line.marked:
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, *(["", _md(table.note)] if table.note else [])]


def _md(text: str) -> str:
    """As it stands, whatever characters a name is made of."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text.replace("\n", " "))


# --- CSV -------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "run", "kind", "arm", "family", "level", "seed", "learning_rate", "parameters", "training_flops_per_token",
    "cache_bytes_per_token", "cache_ratio_to_mha", "tokens", "validation_loss", "validation_bits_per_byte", "test_loss",
    "test_perplexity", "test_bits_per_byte", "test_tokens", "tokens_per_second", "seconds", "kernel", "precision", "device",
    "torch", "commit", "setup_hash", "data_fingerprint",
)  # fmt: skip
_FROM_SUMMARY = ("parameters", "training_flops_per_token", "cache_bytes_per_token", "cache_ratio_to_mha", "tokens",
                 "tokens_per_second", "seconds", "kernel", "precision", "device", "torch", "commit", "setup_hash",
                 "data_fingerprint")  # fmt: skip


def as_csv(results: StudyResults) -> str:
    """One row a run, unrounded, those that only the sweep has at the end."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(results, run, "study") for run in results.runs)
    counted = {run.folder for run in results.runs}
    writer.writerows(_row(results, run, "sweep") for run in results.sweep if run.folder not in counted)
    return text.getvalue()


def _row(results: StudyResults, run: RunResult, kind: str) -> dict[str, Any]:
    info = next(arm for arm in results.arms if arm.name == run.arm)
    record = run.evaluation() or {}
    return {
        "run": run.folder.name, "kind": kind, "arm": run.arm, "family": info.family, "level": info.level, "seed": run.seed,
        "learning_rate": run.lr, "validation_loss": run.summary["loss"],
        "validation_bits_per_byte": run.summary["bits_per_byte"], "test_loss": record.get("loss"),
        "test_perplexity": record.get("perplexity"), "test_bits_per_byte": record.get("bits_per_byte"),
        "test_tokens": record.get("evaluated_tokens"),
    } | {key: run.summary[key] for key in _FROM_SUMMARY}  # fmt: skip


# --- JSON ------------------------------------------------------------------------------------------------------------


def as_dict(findings: Findings) -> dict[str, Any]:
    """The verdicts and the figures they rest on, for machines."""
    results = findings.results
    return {
        "study": results.name,
        "question": results.question,
        "command": results.command,
        "metric": results.metric,
        "split": "test",
        "missing": results.missing,
        "failures": results.failures,
        "notes": findings.notes,
        "sigma": findings.sigma,
        "degrees_of_freedom": findings.dof,
        "verdicts": [_verdict(verdict) for verdict in [*findings.declared, *findings.looked_at]],
        "arms": {
            arm.name: {
                "family": arm.info.family, "level": arm.info.level, "reference": arm.info.reference,
                "seeds": [run.seed for run in arm.runs], "learning_rates": sorted({run.lr for run in arm.runs}),
                "mean": None if arm.mean is None else dataclasses.asdict(arm.mean),
                "parameters": arm.summary("parameters"), "cache_bytes_per_token": arm.summary("cache_bytes_per_token"),
                "perplexity": arm.test("perplexity"), "bits_per_byte": arm.test("bits_per_byte"),
            }
            for arm in findings.arms
        },
        "front": findings.front,
        "staircase": [
            {"arm": arm, "step": None if verdict is None else _verdict(verdict)} for arm, verdict in findings.staircase
        ],
        "sweeps": [
            {"arm": sweep.arm, "tokens": sweep.tokens, "losses": {f"{lr:g}": loss for lr, loss in sweep.losses.items()},
             "best": None if sweep.best is None else dataclasses.asdict(sweep.best), "chosen": sweep.chosen}
            for sweep in findings.sweeps
        ],
        "shared_rate": None if findings.shared is None else {
            "learning_rate": findings.shared.lr,
            "means": {arm: dataclasses.asdict(mean) for arm, mean in findings.shared.means.items()},
            "contrasts": [dataclasses.asdict(contrast) for contrast in findings.shared.verdicts],
        },
        "unequal": [fact.name for fact in findings.facts if not fact.equal],
    }  # fmt: skip


def _verdict(verdict: Verdict) -> dict[str, Any]:
    noise = None if verdict.noise is None else dataclasses.asdict(verdict.noise) | {"seeds": verdict.noise_seeds}
    return dataclasses.asdict(verdict.contrast) | {"sentence": verdict.sentence, "evaluation_noise": noise}
