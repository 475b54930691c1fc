"""Names and sentences of files from elsewhere are shown as they are, and can do nothing where they are shown."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.places import ROOT
from harness.errors import UserError, tell
from harness.files.text import aligned, markdown_row, mebibytes, number, visible
from harness.report.comparison import as_text, compare, comparison_csv, comparison_markdown
from tests.report.test_comparison import evaluate, make_run

HOSTILE = "\x1b[2J\x1b]0;owned\x07mla\r\n| forged | 1 | 0.001 |\u202e\u2028"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")  # all but tab and newline


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mla, ±0.1 – é 中 🙂\u00a0%", "mla, ±0.1 – é 中 🙂\u00a0%"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("\u2028\ud800", r"\u2028\ud800"),
        ("👩\u200d👩", "👩\u200d👩"),
        (r"a\nb", r"a\nb"),
    ],
)
def test_what_would_steer_a_terminal_is_escaped_and_nothing_else_is_touched(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("figure", "form", "shown"),
    [
        (0.5, "+.2f", "+0.50"),
        (-0.5, ".2f", "−0.50"),
        (-0.001, "+.2f", "0.00"),
        (0.001, "+.2f", "0.00"),
        (-0.0, "+.1%", "0.0%"),
        (0.0, ".6g", "0"),
        (-1234.5, "+,.1f", "−1,234.5"),
    ],
)
def test_a_number_has_its_sign_and_one_that_rounds_to_zero_has_none(figure: float, form: str, shown: str) -> None:
    assert number(figure, form) == shown


def test_sizes_of_any_cache_are_digits_without_an_exponent() -> None:
    sizes = {40_960: "0.0391", 2**20: "1", 16 * 2**20: "16", 1_047_000_000: "998", 1_048_100_000: "1,000", 2**36: "65,536"}
    assert {size: mebibytes(size) for size in sizes} == sizes


def test_a_cell_cannot_make_a_row_of_its_own() -> None:
    lines = aligned([["name", "bytes"], [HOSTILE, "1"], ["mha", "2", "3"]])
    assert len(lines) == 3 and not any(map(STEERS.search, lines))
    assert len({line.index(figure) for line, figure in zip(lines, ("ytes", "1", "2"), strict=True)} - {0}) >= 1
    assert re.sub(r"\\\|", "", markdown_row([HOSTILE, "1"])).count("|") == 3


def test_records_from_elsewhere_forge_nothing_in_a_comparison(tmp_path: Path) -> None:
    changes = {"name": HOSTILE, "model": HOSTILE, "dataset": HOSTILE, "device": HOSTILE, "commit": HOSTILE}
    runs = [make_run(tmp_path, variant, dataset=HOSTILE) for variant in ("mha", "mla")]
    summary = json.loads((runs[1] / "summary.json").read_text()) | changes | {"attention": f"=HYPERLINK(1)|*{HOSTILE}"}
    (runs[1] / "summary.json").write_text(json.dumps(summary))
    for run in runs:
        evaluate(run, file="x")
    comparison = compare([tmp_path])
    text, document, table = as_text(comparison), comparison_markdown(comparison), comparison_csv(comparison)
    assert not any(map(STEERS.search, (text, document, table)))
    assert not re.search(r"^\| forged", text + document, flags=re.M)
    rows = list(csv.reader(io.StringIO(table)))
    assert len(rows) == 3 and all(len(row) == len(rows[0]) for row in rows)
    assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row)
    lines = [line for line in document.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(lines) >= 4 and len(columns) == 1, lines  # nothing that was sent opens or closes a cell


def test_a_sentence_holds_only_what_a_terminal_prints() -> None:
    assert str(UserError("a\uaaf7\x1b[0m\u202eb\nc\ud800")) == r"a\uaaf7\x1b[0m\u202eb c\ud800"


def test_a_sentence_on_standard_error_is_one_line_that_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tell(f"corpus {HOSTILE}: left out")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not STEERS.search(said) and r"\x1b[2J" in said


PRINTS = "from harness.entry.streams import protect_streams; protect_streams(verbatim={}); print('a\\x1b[2J\\rb\\u202e\\tc')"


def test_standard_output_shows_what_would_steer_a_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTS.format(False)], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode() == "a\\x1b[2J\\rb\\u202e\tc\n"


def test_a_text_that_is_the_result_reaches_a_file_as_it_is_and_a_terminal_does_not_obey_it() -> None:
    line = [sys.executable, "-c", PRINTS.format(True)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode() == "a\x1b[2J\rb\u202e\tc\n"
    master, terminal = pty.openpty()
    subprocess.run(line, cwd=ROOT, stdout=terminal, check=True)
    os.close(terminal)
    assert "a\\x1b[2J\\rb\\u202e" in os.read(master, 1000).decode()
    os.close(master)
