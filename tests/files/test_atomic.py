"""Files that belong together are of one command: a full disk, or a kill, leaves no mixture of two."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

import harness.report.page
import harness.report.plots
import harness.report.write
import harness.runs.folder
from harness.errors import UserError
from harness.files.atomic import write_text, written_together
from scripts import benchmark_decode, compare_runs, report
from tests.decode.test_speed import MICRO
from tests.report.test_comparison import make_run
from tests.support.micro import contents
from tests.support.study_runs import ARMS, write_study


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def decode(folder: Path, number: int) -> Path:
    options = ["attention=gqa", "contexts=8", "batch_sizes=1", "peers=false", "prefill_tokens=0", f"seed={number}"]
    assert benchmark_decode.main([*MICRO, f"out={folder / 'out'}", *options]) == 0
    return folder / "out"


def compared(folder: Path, number: int) -> Path:
    make_run(folder / "runs", "mla", number)
    assert compare_runs.main([str(folder / "runs"), f"out={folder / 'out'}", "tracking=none"]) == 0
    return folder / "out"


def reported(folder: Path, number: int) -> Path:
    if not (folder / "study").exists():
        write_study(
            folder / "study",
            {"mha": ARMS["mha"], "mla": ARMS["mla"]},
            seeds=(0,),
            contrasts=[["mla", "mha"]],
            segments=0,
            extras=False,
        )
    else:  # another record, so another report
        record = folder / "study" / "study.json"
        record.write_text(record.read_text().replace("What does", f"{number}: what does"))
    assert report.main(["name=study", f"runs_dir={folder}"]) == 0
    return folder / "study"


COMMANDS: dict[str, tuple[Callable[[Path, int], Path], Any, str]] = {
    "benchmark_decode": (decode, harness.report.plots, "save_png"),
    "compare_runs": (compared, harness.report.plots, "save_png"),
    "report": (reported, harness.report.write, "write_json"),
}


@pytest.fixture
def drawn_at_once() -> Iterator[None]:
    """What the pages' pictures are does not matter here, and drawing them takes seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(harness.report.page, "as_svg", lambda *_, **__: Markup(""))
        patched.setattr(harness.report.write, "save_png", lambda picture, path: write_text(path, picture.name))
        yield


@pytest.mark.usefixtures("drawn_at_once")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fills_up_leaves_the_set_of_before(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, module, last = COMMANDS[command]
    folder = run(tmp_path, 0)
    before = contents(folder)
    monkeypatch.setattr(module, last, full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device.: .*make room"):
        run(tmp_path, 1)
    monkeypatch.undo()
    after = contents(folder)
    assert {name: text for name, text in after.items() if name != "study.json"} == {
        name: text for name, text in before.items() if name != "study.json"
    }
    run(tmp_path, 2)
    assert contents(folder).keys() == before.keys() and contents(folder) != before


def test_killed_while_they_take_their_places_no_record_stands_beside_files_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(text: str) -> None:
        with written_together(tmp_path, record="r.json", stale=["*.png"], what="it", remedy="wait") as temporary:
            for name in ("a.csv", "r.json", "s.csv") + (("old.png",) if text == "old" else ()):
                (temporary / name).write_text(text)

    write("old")
    replace, moved = harness.runs.folder.os.replace, []

    def killed(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(harness.runs.folder.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    monkeypatch.undo()
    assert not (tmp_path / "r.json").exists() and not [path for path in tmp_path.iterdir() if path.is_dir()]
    write("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(("a.csv", "r.json", "s.csv"), "new")
