"""docs/CLAIMS.md: every command is run, and every figure is what the commands beside it print."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from harness.hf import cache
from scripts import kv_calculator

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/CLAIMS.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part.partition("\n")[2] for part in re.split(r"^## ", TEXT, flags=re.M)[1:]}
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"(?<![\w.#/-])\d[\d,]*(?:\.\d+)?(?=M?(?![\w-]))")
CONFIGS = sorted((ROOT / "docs/hf_configs").glob("*.json"))


@pytest.fixture(autouse=True)
def measured_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calculator measures here, where the libraries are loaded once, in place of a process for each command."""
    monkeypatch.setattr(cache, "describe_apart", cache.describe_config)


def commands(section: str) -> list[tuple[str, list[str]]]:
    """(command, the lines that it is said to print) of a section, in order."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(CONSOLE.findall(SECTIONS[section])).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


@functools.cache
def output(command: str) -> str:
    """What the command prints: python -c and the calculator, in this process."""
    python, *words = shlex.split(command)
    assert python == "python", command
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if words[0] == "-c":
            exec(words[1], {})
        else:
            assert words[0] == "scripts/kv_calculator.py", command
            assert kv_calculator.main(words[1:]) == 0
    return printed.getvalue()


def plain(line: str) -> str:
    return " ".join(line.split())


def figures(text: str) -> set[str]:
    """Numbers of two digits and more, or with a decimal point, without their commas."""
    found = {figure.replace(",", "") for figure in FIGURE.findall(text)}
    return {figure for figure in found if len(figure) > 1}


CLAIMS = [section for section in SECTIONS if section != "Caches of common models"]


@pytest.mark.parametrize("section", CLAIMS)
def test_every_command_prints_the_lines_beneath_it(section: str) -> None:
    assert commands(section)
    for command, lines in commands(section):
        assert lines, f"nothing is shown of: {command}"
        printed = output(command)
        for line in lines:
            if command.endswith("--json"):
                assert re.search(rf"{re.escape(line)}(?=[,}}])", printed), f"{command} does not print {line}"
            else:
                assert plain(line) in map(plain, printed.splitlines()), f"{command} does not print {line}"


@pytest.mark.parametrize("section", CLAIMS)
def test_every_figure_in_the_prose_stands_in_the_section_s_commands_or_what_they_print(section: str) -> None:
    prose = CONSOLE.sub("", f"{section}\n{SECTIONS[section]}")
    prose = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)", "", prose)
    shown = figures("".join(CONSOLE.findall(SECTIONS[section])))
    assert figures(prose) - shown == set()


def test_the_table_of_caches_is_what_the_command_above_it_prints() -> None:
    section = SECTIONS["Caches of common models"]
    (command,) = re.findall(r"^python (scripts/kv_calculator.py .*)$", section, re.MULTILINE)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if re.match(r"\| .*\d", line) and "NAME" not in line
    ]
    assert len(rows) >= 12
    for model, name, *cells in rows:
        found = json.loads(output(f"python {command.replace('NAME', name)} --json"))
        keys = ("elements_per_token_per_layer", "layers", "bytes_per_token", "total_bytes", "largest_batch")
        assert [int(cell.replace(",", "")) for cell in cells] == [found[key] for key in keys], name
        window = re.search(r"window ([\d,]+)", model)
        windows = found["window"] if isinstance(found["window"], list) else [found["window"]]
        assert {width for width in windows if width} == ({int(window[1].replace(",", ""))} if window else set())


def test_every_shipped_config_is_used_and_takes_nothing_from_defaults() -> None:
    assert CONFIGS
    for path in CONFIGS:
        assert f"{path.stem}.json" in TEXT or f"| {path.stem} |" in TEXT, path.name
        notes = json.loads(output(f"python scripts/kv_calculator.py --config {path} --json"))["notes"]
        assert not any("default" in note for note in notes), (path.name, notes)


def test_a_wrong_figure_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    section = CLAIMS[0]
    monkeypatch.setitem(SECTIONS, section, SECTIONS[section].replace("56.9 times smaller", "57.9 times smaller"))
    with pytest.raises(AssertionError, match="does not print"):
        test_every_command_prints_the_lines_beneath_it(section)
    monkeypatch.setitem(SECTIONS, section, SECTIONS[section].replace("32,768 elements", "32,769 elements"))
    with pytest.raises(AssertionError, match="32769"):
        test_every_figure_in_the_prose_stands_in_the_section_s_commands_or_what_they_print(section)
