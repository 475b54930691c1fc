"""What cannot be seen is not absent: a run whose files are out of reach for a moment goes on once they are back."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eval_model
import train_model
from harness.data.prepared import open_prepared
from harness.errors import UserError
from harness.training.optimizer import Optimizer
from scripts import convert, export, generate, show_runs, sync_wandb
from tests.support.micro import Workplace, contents, metrics_of, summary_of, without_clocks

OFTEN = ["intervals.log=1", "intervals.evaluate=2", "intervals.checkpoint=2"]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def begun(place: Workplace) -> Path:
    """A run that lacks its summary."""
    run = place.train("run", *OFTEN)
    (run / "summary.json").unlink()
    return run


def test_a_run_that_was_removed_while_it_was_scored_is_not_brought_back(
    place: Workplace, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.train("run", *OFTEN)
    scored = eval_model.score_run

    def removing(*arguments: Any) -> Any:
        result = scored(*arguments)
        shutil.rmtree(begun)
        return result

    monkeypatch.setattr(eval_model, "score_run", removing)
    with pytest.raises(UserError, match=r"was removed while it was evaluated"):
        place.evaluate("run=run", "split=validation")
    assert not begun.exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_checkpoints_that_cannot_be_listed_are_an_error_before_anything_is_written(
    place: Workplace, begun: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, iterdir = contents(begun), Path.iterdir

    def refused(self: Path) -> Iterator[Path]:
        if self.name == "checkpoints":
            raise OSError(number, os.strerror(number), str(self))
        return iterdir(self)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", refused)
        sentence = rf"checkpoints cannot be read \({os.strerror(number)}\): make it readable"
        with pytest.raises(UserError, match=sentence):
            place.train("run", *OFTEN)
    assert contents(begun) == before
    place.train("run", *OFTEN)
    assert metrics_of(begun) and (begun / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_checkpoint_that_may_not_be_read_is_no_damage_and_an_error_before_anything_is_written(
    place: Workplace, begun: Path, number: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, opened = contents(begun), Path.open

    def refused(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == name and self.parent.name == "step-00000006":
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refused)
        with pytest.raises(UserError, match=rf"step-00000006 cannot be read \({os.strerror(number)}: .*{name}\): make it"):
            place.train("run", *OFTEN)
    assert contents(begun) == before
    place.train("run", *OFTEN)


@pytest.mark.parametrize(
    ("command", "hidden"),
    [
        ("train", "run/config.yaml"),
        ("train", ".run.overwritten"),
        ("start", "run/config.yaml"),
        ("show", "run/config.yaml"),
        ("sync", "run/config.yaml"),
    ],
)
def test_a_run_that_may_not_be_entered_is_an_error(
    place: Workplace, begun: Path, command: str, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, stat = contents(begun), os.stat

    def refused(path: Any, **options: Any) -> os.stat_result:
        if path == place.runs / hidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    def start() -> None:
        match command:
            case "train":
                place.train("run", *OFTEN)
            case "start":
                place.train("other", f"init_from={begun}")
            case "show":
                pytest.importorskip("trackio")
                show_runs.main([f"runs_dir={place.runs}"])
            case _:
                sync_wandb.main([f"runs_dir={place.runs}"])

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refused)
        with pytest.raises(UserError, match=r"cannot be read \(Permission denied"):
            start()
    assert contents(begun) == before


@pytest.mark.parametrize("command", [generate, export, convert, train_model])
def test_weights_of_an_earlier_step_are_not_those_of_a_finished_run(place: Workplace, command: Any) -> None:
    """What its records say is said of the last."""
    run = place.train("run", *OFTEN, "attention=gqa")
    (run / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"")
    options = {
        generate: ["run=run", "device=cpu"],
        export: ["run=run", f"to={place.folder / 'to'}"],
        convert: ["run=run", f"to={place.runs / 'to'}", "method=gqa_mean", "n_kv_heads=1", "device=cpu"],
        train_model: ["name=to", "init_from=run", *place.places()[1:]],
    }[command]
    with pytest.raises(UserError, match=r"the last checkpoint of .*run \(step 6\) is damaged or missing"):
        command.main([f"runs_dir={place.runs}", *options])
    assert not (place.folder / "to").exists() and not any(place.runs.glob("to/checkpoints/*"))


def absent(folder: Path) -> None:
    """As moved away."""


def linked(folder: Path) -> None:
    folder.symlink_to(folder.parent.parent / "no such disk")


@pytest.mark.parametrize("leave", [absent, Path.mkdir, linked])
def test_checkpoints_on_a_disk_that_is_not_mounted_are_an_error_before_anything_is_written(
    place: Workplace, begun: Path, leave: Callable[[Path], None]
) -> None:
    summary, rows = without_clocks(summary_of(place.train("other", *OFTEN))), metrics_of(begun)
    checkpoints, disk = begun / "checkpoints", place.folder / "disk"
    checkpoints.rename(disk)
    leave(checkpoints)
    before = contents(begun)
    with pytest.raises(UserError, match=r"holds no checkpoint, and this run has written some: bring them back"):
        place.train("run", *OFTEN)
    assert contents(begun) == before
    if checkpoints.is_symlink():
        checkpoints.unlink()
    disk.rename(checkpoints)
    place.train("run", *OFTEN)
    assert without_clocks(summary_of(begun)) | {"name": "other"} == summary and metrics_of(begun) == rows


def test_rows_of_a_run_of_which_nobody_knows_whether_it_had_checkpoints_are_kept(
    place: Workplace, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (begun / "checkpoints").rename(place.folder / "disk")
    (begun / ".checkpoints-written").unlink()  # as versions before it left a run
    rows = (begun / "metrics.jsonl").read_bytes()
    for number in (1, 2):
        place.train("run", *OFTEN)
        assert f"has no checkpoint and starts anew; its rows up to step 6 are kept in metrics.{number}.jsonl" in (
            capsys.readouterr().err
        )
        for path in (begun / "checkpoints", begun / ".checkpoints-written", begun / "summary.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (begun / "metrics.1.jsonl").read_bytes() == rows


@pytest.mark.parametrize("line", [b"{}\n", b"no JSON\n", b"[1]\n"])
def test_rows_of_which_not_all_are_ours_are_kept(place: Workplace, begun: Path, line: bytes) -> None:
    (begun / "checkpoints").rename(place.folder / "disk")
    (begun / ".checkpoints-written").unlink()
    (begun / "metrics.jsonl").write_bytes(line)
    place.train("run", *OFTEN)
    assert (begun / "metrics.1.jsonl").read_bytes() == line


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew_without_a_word(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.train("run", *OFTEN, "budget.steps=1")
    for path in (run / "checkpoints", run / ".checkpoints-written", run / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    place.train("run", *OFTEN, "budget.steps=1")
    assert "anew" not in capsys.readouterr().err and not (run / "metrics.1.jsonl").exists()


def test_a_run_whose_checkpoints_are_gone_for_good_is_trained_anew_when_that_is_asked_for(
    place: Workplace, begun: Path
) -> None:
    (begun / "checkpoints").rename(place.folder / "disk")
    place.train("run", *OFTEN, "overwrite=true")
    assert summary_of(begun)["steps"] == 6


def test_a_run_whose_metrics_are_cut_goes_on_from_its_checkpoint_and_says_what_is_lost(
    place: Workplace, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, file = metrics_of(begun), begun / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-100])
    place.train("run", *OFTEN)
    assert "those between are lost, what is there stays, and the run goes on" in capsys.readouterr().err
    assert metrics_of(begun) == rows[:-1] and summary_of(begun)["steps"] == 6


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tokens_that_are_cut_while_they_are_trained_on_end_in_a_sentence_and_the_run_goes_on_with_them_back(
    place: Workplace, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read beyond the end of a mapped file would be SIGBUS."""
    options = [*OFTEN, "budget.steps=16"]
    whole, original, calls = place.train("whole", *options), Optimizer.step, 0
    (file,) = place.folder.glob(f"data/*/{split}.bin")

    def stepping(self: Optimizer) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.truncate(file, 10)
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "step", stepping)
        with pytest.raises(
            UserError, match=rf"{split}.bin was cut while it was in use and has 10 bytes, not [\d,]+: start the same"
        ):
            place.train("run", *options)
    run = place.train("run", *options)  # which prepares the data again
    assert without_clocks(summary_of(run)) | {"name": "whole"} == without_clocks(summary_of(whole))


def test_tokens_that_are_replaced_or_deleted_are_read_on_as_they_were(place: Workplace) -> None:
    place.train("run", "budget.steps=1")
    (folder,) = (meta.parent for meta in place.folder.glob("data/*/meta.json"))
    tokens = open_prepared(folder).splits["train"].tokens
    before = np.array(tokens[:100])
    (folder / "other").write_bytes(b"")
    (folder / "other").replace(folder / "train.bin")
    assert (tokens[np.arange(100)] == before).all() and type(tokens[np.arange(100)]) is np.ndarray
    (folder / "train.bin").unlink()
    assert (tokens[10:][:90] == before[10:]).all()
