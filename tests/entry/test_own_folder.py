"""A run writes into its own folder and nowhere else; an older run that is overwritten lives until the new one does."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import train_model
from harness.config.run_config import load_run_config
from harness.errors import UserError
from harness.files.folders import refuse_links
from harness.training.optimizer import Optimizer
from tests.support.attempts import Killer
from tests.support.micro import Workplace, contents, summary_of
from tests.support.tiny_model import find_damage

OFTEN = ["intervals.log=1", "intervals.evaluate=2", "intervals.checkpoint=2"]
FEW = 8


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["checkpoints", "evaluations", "segments", "wandb", "checkpoints/best", "checkpoints/step-00000004", "metrics.jsonl"],
)
def test_a_link_in_a_run_is_refused_before_anything_is_written_and_a_copy_in_its_place_is_taken(
    place: Workplace, name: str
) -> None:
    run, mine = place.train("run", *OFTEN), place.folder / "mine"
    for folder in ("evaluations", "segments", "wandb"):
        (run / folder).mkdir()
    (run / name).rename(mine)
    (run / name).symlink_to(mine)
    before, my_own = contents(run), contents(mine) if mine.is_dir() else mine.read_bytes()
    with pytest.raises(UserError, match=rf"{name} is a link, and nothing is written or deleted through one: put what it"):
        place.evaluate("run=run", "split=validation")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=rf"{name} is a link"):
        place.train("run", *OFTEN)
    assert contents(run) | {"summary.json": before["summary.json"]} == before
    assert (contents(mine) if mine.is_dir() else mine.read_bytes()) == my_own
    (run / name).unlink()
    mine.rename(run / name)
    place.train("run", *OFTEN)
    place.evaluate("run=run", "split=validation")


def test_metrics_with_a_second_name_are_refused_and_the_remedy_works(place: Workplace) -> None:
    run, mine = place.train("run", *OFTEN), place.folder / "mine.jsonl"
    (run / "summary.json").unlink()
    os.link(run / "metrics.jsonl", mine)
    before = mine.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl has a second name .*: put a copy in its place \(cp -p FILE"):
        place.train("run", *OFTEN)
    shutil.copy2(run / "metrics.jsonl", run / "copy")
    (run / "copy").rename(run / "metrics.jsonl")
    place.train("run", *OFTEN)
    assert mine.read_bytes() == before


def test_a_run_that_is_overwritten_leaves_what_its_links_lead_to(place: Workplace) -> None:
    run, mine = place.train("run", *OFTEN), place.folder / "mine"
    (run / "checkpoints").rename(mine)
    (run / "checkpoints").symlink_to(mine)
    before = contents(mine)
    place.train("run", *OFTEN, "overwrite=true")
    assert contents(mine) == before and not (run / "checkpoints").is_symlink()


def test_a_run_whose_folder_is_a_link_is_trained_continued_overwritten_and_scored_where_it_lies(place: Workplace) -> None:
    disk = place.folder / "other disk" / "the run"
    disk.mkdir(parents=True)
    place.runs.mkdir()
    (place.runs / "run").symlink_to(disk)
    place.train("run", *OFTEN)
    (disk / "summary.json").unlink()
    place.train("run", *OFTEN)
    place.train("run", *OFTEN, "overwrite=true", "seed=1")
    place.evaluate("run=run", "split=validation")
    assert (place.runs / "run").is_symlink() and summary_of(disk)["seed"] == 1 and any(disk.glob("evaluations/*"))
    assert [path.name for path in disk.parent.iterdir() if "lock" not in path.name] == ["the run"]


def test_a_lock_that_is_a_link_cuts_nothing(place: Workplace) -> None:
    mine = place.folder / "mine.txt"
    mine.write_text("my own text\n")
    place.runs.mkdir()
    (place.runs / ".run.lock").symlink_to(mine)
    with pytest.raises(UserError, match="cannot be written"):
        place.train("run", *OFTEN)
    assert mine.read_text() == "my own text\n"


def test_links_beside_what_is_written_make_and_delete_nothing_elsewhere(place: Workplace) -> None:
    """In the place of the note that checkpoints were written, and of an older run that is overwritten."""
    run, mine = place.train("run", *OFTEN), place.folder / "mine"
    mine.mkdir()
    (mine / "text.txt").write_text("my own")
    for path in (run / "summary.json", run / ".checkpoints-written"):
        path.unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / ".checkpoints-written").symlink_to(mine / "new")
    (run.parent / ".run.overwritten").symlink_to(mine)
    place.train("run", *OFTEN)
    place.train("run", *OFTEN, "overwrite=true")
    assert contents(mine) == {"text.txt": b"my own"}
    assert {path.name for path in run.parent.iterdir()} == {"run", ".run.lock"}


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("metrics.jsonl", as_pipe),
        ("metrics.jsonl", Path.mkdir),
        ("summary.json", Path.mkdir),
        ("tokenizer.json", Path.mkdir),
        ("checkpoints/step-00000006", as_pipe),
        ("checkpoints/step-00000006", Path.touch),
        ("checkpoints/best", as_pipe),
    ],
)
def test_what_is_no_file_or_folder_in_the_place_of_one_is_one_sentence(
    place: Workplace, name: str, make: Callable[[Path], None]
) -> None:
    """A pipe, whose end never comes, would hold the command up for ever."""
    tokenizer = ["tokenizer=bpe", "tokenizer.vocab_size=300"]
    run = place.train("run", *OFTEN, *tokenizer)
    (run / "summary.json").rename(place.folder / "summary.json")
    if (run / name).exists():
        (run / name).rename(place.folder / "kept")
    make(run / name)
    sentence = rf"{name} is no (file|folder), as it has to be: move it away|cannot be written \(Is a directory: .*{name}"
    with pytest.raises(UserError, match=sentence):
        place.train("run", *OFTEN, *tokenizer)


def test_second_names_of_our_own_are_no_links(place: Workplace) -> None:
    run = place.train("run", *OFTEN)
    assert (run / "checkpoints" / "best" / "model.safetensors").stat().st_nlink == 2
    refuse_links(run)


# --- a folder that goes away -----------------------------------------------------------------------------------------


def removed(run: Path) -> None:
    while run.exists():  # a checkpoint may be written meanwhile
        shutil.rmtree(run, ignore_errors=True)


def moved(run: Path) -> None:
    run.rename(run.with_name("moved"))


def replaced(run: Path) -> None:
    moved(run)
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run.with_name("moved") / name, run)


@pytest.mark.parametrize("leave", [removed, moved, replaced])
@pytest.mark.parametrize("when", [3, 6])
@pytest.mark.parametrize(
    "options",
    [OFTEN, ["intervals.log=100", "intervals.evaluate=100", "intervals.checkpoint=2", "checkpoints.background=false"]],
)
def test_a_run_whose_folder_goes_away_while_it_is_trained_ends_in_a_sentence(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, leave: Callable[[Path], None], when: int, options: list[str]
) -> None:
    original, calls = Optimizer.step, 0

    def stepping(self: Optimizer) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            leave(place.runs / "run")
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "step", stepping)
        with pytest.raises(UserError, match=r"was removed(, moved or replaced)? while the run was trained"):
            place.train("run", *options)
    assert not (place.runs / "run" / "summary.json").exists()
    assert leave is replaced or not (place.runs / "run").exists(), "nor is half of it brought back"
    assert summary_of(place.train("run", *options))["steps"] == 6


# --- overwriting -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(0)
def test_killed_before_any_change_of_a_file_a_command_that_overwrites_has_lost_nothing(
    killer: Killer, request: pytest.FixtureRequest
) -> None:
    """Until the new run has a checkpoint, the next command finds the older one as it was; then the new one goes on."""
    seed, every = random.randrange(2**32), range(1, killer.events)
    chosen = every if request.config.getoption("--kills") else random.Random(seed).sample(every, FEW)
    old, kept, older = contents(killer.whole), 0, 0
    for event in chosen:
        run = killer.place.runs / f"over-{event}"
        shutil.copytree(killer.whole, run)
        status = killer.attempt(run.name, "overwrite=true", "seed=1", event=event)["status"]
        assert status in (0, -9)
        if status == 0:
            continue
        is_new = (run / "config.yaml").exists() and load_run_config(run).seed == 1
        new = is_new and any(find_damage(path) is None for path in run.glob("checkpoints/step-*"))
        status = killer.attempt(run.name, "seed=1", after=60)["status"]
        if new:
            assert status == 0 and summary_of(run)["seed"] == 1
            kept += 1
        else:
            assert status == 1 and contents(run) == old, "refused: it is the older run, of another seed"
            older += 1
        left = {path.name for path in run.parent.glob(f".{run.name}.*")}
        assert left <= {f".{run.name}.lock"}
    print(f"the older run was kept {older} times, the new one went on {kept} times (seed {seed})")
    assert kept + older > len(chosen) / 2, "hardly any was killed"


@pytest.mark.timeout(0)
def test_putting_the_older_run_back_may_be_killed_too(killer: Killer) -> None:
    old = contents(killer.whole)
    for event in range(1, 40):
        run = killer.place.runs / f"back-{event}"
        shutil.copytree(killer.whole, run)
        assert killer.attempt(run.name, "overwrite=true", "seed=1", event=12)["status"] == -9
        assert not any(run.glob("checkpoints/step-*"))
        if killer.attempt(run.name, "seed=1", event=event)["status"] != -9:
            break
        assert killer.attempt(run.name, "seed=1", after=60)["status"] == 1
        assert contents(run) == old
    assert contents(run) == old and event > 5


def test_a_new_run_that_fails_before_its_first_checkpoint_puts_the_older_one_back(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.train("run", *OFTEN)
    before = contents(run)

    def fail(self: Optimizer) -> None:
        raise RuntimeError("ours")

    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "step", fail)
        with pytest.raises(RuntimeError, match="ours"):
            train_model.main(place.overrides("name=run", *OFTEN, "overwrite=true", "seed=1"))
    assert contents(run) == before
