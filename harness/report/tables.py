"""A study's report as Markdown, and its runs as CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from harness.evaluation.metric import METRICS, SCORES, Facts, Shown, declared
from harness.files.text import csv_text, markdown, table_of, visible
from harness.report.document import Section, TextTable
from harness.report.findings import Findings
from harness.study.results import AT_LENGTH, CIRCUMSTANCES, IDENTITY, SIZES, RunResult, StudyResults, bytes_at_length


def study_markdown(findings: Findings, parts: Sequence[Section]) -> str:
    """The same report for a repository or a terminal."""
    record = findings.results.record
    lines = [f"# {_md(record['question'])}", "", f"Study {_md(record['name'])}.", ""]
    lines += [f"- **{_md(failure['run'])} failed:** {_md(failure['error'])}" for failure in record["failures"]]
    lines += [f"- **Note:** {_md(note)}." for note in findings.notes]
    for section in parts:
        lines += ["", f"## {_md(section.title)}", ""]
        lines += [part for text in section.words for part in (_md(text), "")]
        lines += [f"- {_md(point)}" for point in section.points]
        for picture in section.pictures:
            lines += [
                "",
                f"![{_md(picture.title)}](figures/{picture.name}.png)",
                "",
                f"{_md(picture.title)}. {_md(picture.caption)}",
            ]
        for table in section.tables:
            lines += ["", *_md_table(table)]
        if section.code:
            lines += ["", *_fenced(section.code)]
        lines += [part for text in section.after for part in ("", _md(text))]
        lines += ["", *(f"- {_md(point)}" for point in section.more)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _md_table(table: TextTable) -> list[str]:
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
    return markdown(text.replace("\n", " "))


def _fenced(code: str) -> list[str]:
    """A block of code, between fences longer than any that the code has."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", visible(code), fence]


def study_csv(results: StudyResults) -> str:
    """One row a run, unrounded, those that only the sweep has at the end."""
    counted = {run.folder for run in results.runs}
    rows = [_row(results, run, "study") for run in results.runs]
    rows += [_row(results, run, "sweep") for run in results.sweep if run.folder not in counted]
    return csv_text(table_of(rows))


def _row(results: StudyResults, run: RunResult, kind: str) -> dict[str, Any]:
    info = results.record["arms"][run.arm]
    record, summary = run.evaluation() or {}, dict(run.summary)
    return {
        "run": run.folder.name,
        "kind": kind,
        "arm": run.arm,
        "family": info["family"],
        "lineage": results.lineages().get(run.arm, run.arm),
        "level": info["level"],
        "seed": run.seed,
        "learning_rate": run.lr,
        **{key: summary.get(key) for key in dict.fromkeys([*SIZES, *declared(Facts, Shown)])},
        "cache_context": run.summary.get("cache_context"),  # of cache_bytes_per_token
        AT_LENGTH: bytes_at_length(run.summary),
        **{f"validation_{name}": score.of(summary) for name, score in SCORES.items()},
        **{f"test_{name}": metric.of(record) for name, metric in METRICS.items()},
        "test_tokens": record.get("evaluated_tokens"),
        **{key: summary[key] for key in (*CIRCUMSTANCES, *IDENTITY)},
    }
