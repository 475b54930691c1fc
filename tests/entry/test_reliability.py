"""What a run survives beside being killed: full disks, broken checkpoints, bad numbers, a larger budget, W&B."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

import train_model
from harness.config.run_config import load_run_config
from harness.data.parquet import read_parquet
from harness.data.prepared import open_prepared
from harness.errors import UserError
from harness.files.metrics import MetricsFile
from harness.runs.load import load_trained
from harness.training import checkpoint
from harness.training.checkpoint import latest_checkpoint, verified
from harness.training.nonfinite import NonFiniteError
from modeling.attention import EXECUTION
from scripts import generate
from tests.support.forks import Forks
from tests.support.micro import STEPS, Workplace, contents, metrics_of, rows_of_steps, summary_of, without_clocks
from tests.support.mutations import flip, truncate
from tests.support.tiny_model import find_damage
from tests.support.wandb_server import WandbServer

OFTEN = ["intervals.log=1", "intervals.evaluate=2", "intervals.checkpoint=2", "model.dropout=0.1"]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_equal(run: Path, whole: Path) -> None:
    assert [without_clocks(line) for line in metrics_of(run)] == [without_clocks(line) for line in metrics_of(whole)]
    last = f"checkpoints/step-{summary_of(whole)['steps']:08}/model.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes()
    assert without_clocks(summary_of(run)) | {"name": whole.name} == without_clocks(summary_of(whole))


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_disk_that_fills_up_ends_training_in_one_sentence_and_the_run_goes_on_when_there_is_room(
    place: Workplace, background: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*OFTEN, f"checkpoints.background={background}"]
    whole = place.train("whole", *options)
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:  # of the second checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            UserError,
            match=r"cannot be written \(No space left on device\); its last checkpoint, "
            r"step-00000002, is intact: make room",
        ):
            place.train("run", *options)
    run = place.runs / "run"
    assert "step-00000002" in saved(run) and find_damage(run / "checkpoints" / "step-00000002") is None
    assert not (run / "summary.json").exists()
    place.train("run", *options)
    assert_equal(run, whole)


def test_metrics_that_a_full_disk_takes_a_part_of_are_cut_there_and_written_whole_afterwards(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses what goes beyond so many bytes a file, in the middle of a line of metrics.jsonl."""
    # Not in the background, whose thread the limit would meet as well.
    often = [*OFTEN, "checkpoints.background=false"]
    whole = place.train("whole", *often)
    limit = (whole / "metrics.jsonl").read_bytes().index(b'"step": 5') + 7
    append = MetricsFile.append

    def limited(self: MetricsFile, row: Mapping[str, float]) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            append(self, row)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "append", limited)
        with pytest.raises(
            UserError,
            match=r"full cannot be written \(File too large\); its last checkpoint, "
            r"step-00000004, is intact: .*same command again$",
        ):
            place.train("full", *often)
    run = place.runs / "full"
    assert (run / "metrics.jsonl").stat().st_size == limit
    place.train("full", *often)
    assert_equal(run, whole)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_real_disk_that_is_full_or_read_only_keeps_the_last_good_checkpoint(
    place: Workplace, trouble: str, forks: Forks
) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-r", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no name spaces of its own for an ordinary user here")
    options = [*OFTEN, "checkpoints.keep=100", "checkpoints.keep_best=false", "budget.steps=1000"]
    kept = place.folder / "kept"
    place.runs.mkdir(exist_ok=True)
    kept.mkdir()
    if trouble == "full":  # a checkpoint takes 250 kB
        size, meanwhile = "2m", "true"
    else:
        folder = f"'{place.runs}'/run/checkpoints"
        wait = f"while [ ! -d {folder}/step-00000004 ]; do sleep 0.02; done"
        # Read-only before it is put in place: a mount cannot be made so while a checkpoint is being written in it.
        locked = f"'{place.runs}'/locked"
        lock = f"mkdir {locked} && mount --bind {folder} {locked} && mount -o remount,bind,ro {locked}"
        size, meanwhile = "64m", f"{wait}; {lock} && mount --bind {locked} {folder}"
    disk = [size, str(place.runs), str(kept), meanwhile]
    result = forks.run("tests/support/small_disk.py", *disk, *place.overrides("name=run", *options))
    errors = [line for line in result.errors.splitlines() if line.startswith("error: ")]
    assert result.status == 2 and len(errors) == 1 and "Traceback" not in result.errors, result.errors
    assert re.search(r"make room", errors[0]) and re.search(r"No space left|bytes and the disk|Read-only", errors[0])
    run = kept / "run"
    assert latest_checkpoint(run / "checkpoints") is not None
    assert all(find_damage(path) is None for path in run.glob("checkpoints/step-*"))


# --- broken checkpoints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_verified_once_and_read_once_on_one_way_through(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.train("run", *OFTEN)
    (run / "summary.json").unlink()  # as if it had been killed before the last thing it writes
    hashed: list[str] = []
    read: list[str] = []

    def counted(of: Any, seen: list[str]) -> Any:
        return lambda path, *more: (seen.append(path.name), of(path, *more))[1]

    monkeypatch.setattr(checkpoint, "file_sha256", counted(checkpoint.file_sha256, hashed))
    monkeypatch.setattr(checkpoint, "read_object", counted(checkpoint.read_object, read))
    for use in (lambda: place.train("run", *OFTEN), lambda: place.evaluate("run=run")):
        use()
        assert (sorted(hashed), sorted(read)) == (
            ["model.safetensors", "optimizer.safetensors", "state.json"],
            ["manifest.json", "state.json"],
        )
        hashed.clear()
        read.clear()


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_run_whose_newest_checkpoint_is_broken_goes_on_from_the_one_before_and_comes_out_the_same(
    place: Workplace, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], file: str
) -> None:
    whole = place.train("whole", *OFTEN)
    run = place.train("run", *OFTEN)
    (run / "summary.json").unlink()
    damage(run / "checkpoints" / f"step-{STEPS:08}" / file)
    capsys.readouterr()
    place.train("run", *OFTEN)
    said = capsys.readouterr()
    assert f"step-{STEPS:08} is damaged" in said.err and "from step 5" in said.out
    assert_equal(run, whole)


def rewritten(checkpoint: Path, change: Callable[[dict[str, Any]], object], *, whole: bool = False) -> None:
    """What a run saved in state.json changed, or with `whole` all of it, and a manifest that fits it."""
    content = json.loads((checkpoint / "state.json").read_text())
    change(content if whole else content["caller"])
    (checkpoint / "state.json").write_text(json.dumps(content))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    written = (checkpoint / "state.json").read_bytes()
    manifest["state.json"] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def as_an_older_version_wrote_it(checkpoint: Path) -> None:
    def older(state: dict[str, Any]) -> None:
        for key in ("warmup_steps", "evaluation_due", "best", "guard"):
            del state[key]
        del state["last_step"]["skipped"]

    rewritten(checkpoint, older)


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    r"state\.last_step is missing": lambda state: state.pop("last_step"),
    r"state\.last_step\.loss=high must be a finite number": lambda state: state["last_step"].update(loss="high"),
    r"last_step\.number=5 after step 6": lambda state: state["last_step"].update(number=5),
    r"last_step\.tokens=-4, no count": lambda state: state["last_step"].update(tokens=-4),
    r"state\.metrics_bytes=x must be a whole number": lambda state: state.update(metrics_bytes="x"),
    r"state\.metrics_bytes=1e\+308 must be a whole number": lambda state: state.update(metrics_bytes=1e308),
    r"state\.metrics_bytes=-1 must be 0 or more": lambda state: state.update(metrics_bytes=-1),
    r"state\.warmup_steps=-1 must be 0 or more": lambda state: state.update(warmup_steps=-1),
    r"best=\[3.0\], no pair of a step up to 6": lambda state: state.update(best=[3]),
    r"best=\[1e\+308, 1.0\], no pair": lambda state: state.update(best=[1e308, 1]),
    r"best=\[7.0, 1.0\], no pair": lambda state: state.update(best=[7, 1]),
    r"wandb_id=../x, no name": lambda state: state.update(wandb_id="../x"),
    r"state\.guard=5 must be a group": lambda state: state.update(guard=5),
    r"state\.guard\.skipped=-1 must be 0 or more": lambda state: state["guard"].update(skipped=-1),
    r"state\.guard\.losses\[0\]=x must be": lambda state: state["guard"].update(losses=["x"]),
}


def test_a_speed_that_a_state_does_not_know_is_none_in_the_summary(place: Workplace) -> None:
    run = place.train("run", *OFTEN)
    (run / "summary.json").unlink()
    rewritten(run / "checkpoints" / f"step-{STEPS:08}", lambda state: state["last_step"].update(tokens_per_second=None))
    assert summary_of(place.train("run", *OFTEN))["tokens_per_second"] is None


def test_a_state_that_is_none_is_damage_named_by_its_field_and_the_checkpoint_before_is_used(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.train("run", *OFTEN)
    summary, whole = summary_of(run), contents(run)
    for words, change in WRONG.items():
        (run / "summary.json").unlink()
        rewritten(run / "checkpoints" / f"step-{STEPS:08}", change)
        capsys.readouterr()
        place.train("run", *OFTEN)
        assert re.search(rf"step-{STEPS:08} is damaged \(state.json: .*{words}", capsys.readouterr().err), words
        assert without_clocks(summary_of(run)) == without_clocks(summary)
    assert contents(run).keys() == whole.keys()


def test_generators_that_are_none_are_damage_too(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.train("run", *OFTEN)
    (run / "summary.json").unlink()
    rewritten(run / "checkpoints" / f"step-{STEPS:08}", lambda content: content["generators"].pop("numpy"), whole=True)
    place.train("run", *OFTEN)
    assert (
        "is damaged (generators in state.json: generators.numpy is missing); looking for an earlier one"
        in capsys.readouterr().err
    )


MISTAKES = [KeyError, TypeError, AttributeError, IndexError, ValueError]


@pytest.mark.parametrize("error", MISTAKES)
def test_a_mistake_of_ours_is_not_called_damage(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    run = place.train("run", *OFTEN)
    (run / "summary.json").unlink()

    def fail(*_: object, **__: object) -> None:
        raise error("ours")

    read = ("training.checkpoint._describe", "training.checkpoint._headers", "files.untrusted.parse_object")
    for ours in (
        *read,
        "training.checkpoint._set_generators",
        "training.checkpoint._decode",
        "training.nonfinite.Guard.restore",
    ):
        with monkeypatch.context() as planted, pytest.raises(error, match="ours"):
            planted.setattr(f"harness.{ours}", fail)
            place.train("run", *OFTEN)


@pytest.mark.parametrize("error", MISTAKES)
def test_a_mistake_of_ours_is_not_called_a_damaged_parquet_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text"]}), file)
    assert list(read_parquet(file, "text")) == ["a text"]

    def fail(*_: object) -> None:
        raise error("ours")

    monkeypatch.setattr("harness.data.parquet._values", fail)
    with pytest.raises(error, match="ours"):
        list(read_parquet(file, "text"))


def test_a_checkpoint_of_an_older_version_is_continued_and_its_budget_stays(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = place.train("whole", *WSD)
    run = interrupted_at(place, "run", 3, *WSD, monkeypatch=monkeypatch)
    for folder in run.glob("checkpoints/step-*"):
        as_an_older_version_wrote_it(folder)
    with pytest.raises(UserError, match=r"older version.*train on with the budget .* \(budget.steps is 6 there and 8 here"):
        place.train("run", *WSD, "budget.steps=8")
    place.train("run", *WSD)
    assert_equal(run, whole)


# --- the best one ----------------------------------------------------------------------------------------------------


def test_the_step_that_validated_best_is_kept_and_can_be_used(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that grows far too high makes the validation loss rise again."""
    run = place.train(
        "run",
        *OFTEN,
        "optimizer.lr=1",
        "optimizer.grad_clip=0",
        "budget.steps=16",
        "schedule.warmup_fraction=0.7",
        "schedule.final_lr_fraction=1",
    )
    scored = {line["step"]: line["val/loss"] for line in metrics_of(run) if line["step"] and "val/loss" in line}
    best = min(scored, key=scored.__getitem__)
    assert best <= 12, "it is not among the newest, or this test shows nothing"
    assert saved(run) == ["best", "step-00000014", "step-00000016"]
    assert verified(run / "checkpoints" / "best").state["step"] == best
    how = {"device": torch.device("cpu"), "precision": torch.float32, "execution": EXECUTION}
    assert load_trained(run, which="best", **how).step == best  # type: ignore[arg-type]
    assert load_trained(run, **how).step == 16  # type: ignore[arg-type]
    for which in ("best", "last"):
        generate.main([f"run={run}", f"checkpoint={which}", "max_new_tokens=8", "temperature=0", "device=cpu"])
    with pytest.raises(UserError, match="checkpoint=first is unknown: choose last or best"):
        generate.main([f"run={run}", "checkpoint=first"])
    without = place.train("without", "checkpoints.keep_best=false", "checkpoints.keep=1")
    assert saved(without) == [f"step-{STEPS:08}"]
    with pytest.raises(UserError, match=r"holds no best checkpoint, .*checkpoints.keep_best=true keeps: take checkpoint=last"):
        load_trained(without, which="best", **how)  # type: ignore[arg-type]


# --- numbers that go wrong -------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[int, float]], None]]:
    """Activations of the last block's MLP are multiplied by so much in the n-th training forward pass, once only."""
    from modeling.gpt import MLP

    forward = MLP.forward

    def spoil(factors: dict[int, float]) -> None:
        calls = 0

        def spoiling(self: MLP, x_BTD: Tensor) -> Tensor:
            nonlocal calls
            calls += self.training
            factor = factors.get(calls, 1.0) if self.training else 1.0
            return forward(self, x_BTD) * factor

        monkeypatch.setattr(MLP, "forward", spoiling)

    yield spoil


def test_the_first_bad_number_stops_the_run_names_its_place_and_leaves_the_step_before(
    place: Workplace, spoiled: Callable[[dict[int, float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 4 of the model goes wrong, and goes wrong again when it is computed once more."""
    options = [*OFTEN, "checkpoints.keep=9", "intervals.checkpoint=1", "attention=mla"]
    whole = place.train("whole", *options)
    spoiled({4: math.nan, 5: math.nan})
    with pytest.raises(NonFiniteError) as stopped:
        place.train("run", *options, "intervals.checkpoint=2")
    sentence = str(stopped.value)
    assert re.match(r"step 4: the loss is nan and the gradient norm nan", sentence)
    assert "The first number that is not finite is in the output of blocks.0.mlp (" in sentence
    assert "The checkpoint of step 3 is kept." in sentence
    data = open_prepared(next(place.folder.glob("data/*/meta.json")).parent)
    (document,) = [int(word) for word in re.findall(r"document (\d+) of the training split", sentence)]
    assert 0 <= document < data.splits["train"].n_documents
    # What is kept is, generators included, what a checkpoint of that step would have been.
    run = place.runs / "run"
    assert saved(run) == ["best", "step-00000002", "step-00000003"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (run / "checkpoints/step-00000003" / name).read_bytes() == (
            whole / "checkpoints/step-00000003" / name
        ).read_bytes()
    generators = [
        json.loads((folder / "checkpoints/step-00000003/state.json").read_text())["generators"] for folder in (run, whole)
    ]
    assert generators[0] == generators[1]
    assert not (run / "summary.json").exists()
    spoiled({})  # whatever it was has gone
    place.train("run", *options)
    assert_equal(run, whole)


def test_skipping_logs_what_it_skips_and_counts_it(
    place: Workplace, spoiled: Callable[[dict[int, float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled({3: math.inf})
    run = place.train("run", *OFTEN, "on_nonfinite=skip")
    said = capsys.readouterr().out
    assert re.search(r"step 3: skipped, the loss is nan and the gradient norm nan \(document 0 of the training", said)
    trained = [line for line in metrics_of(run) if "train/loss" in line]
    assert [line["train/skipped_steps"] for line in trained] == [0, 0, 1, 1, 1, 1]
    assert [line["train/loss"] is None for line in trained] == [False, False, True, False, False, False]
    assert summary_of(run)["skipped_steps"] == 1 and summary_of(run)["steps"] == STEPS


def test_a_run_whose_last_step_was_skipped_can_be_saved_continued_and_summed_up(
    place: Workplace, spoiled: Callable[[dict[int, float]], None]
) -> None:
    spoiled({STEPS: math.nan})
    run = place.train("run", *OFTEN, "on_nonfinite=skip")
    assert summary_of(run)["train_loss"] is None
    before = without_clocks(summary_of(run))
    (run / "summary.json").unlink()
    place.train("run", *OFTEN, "on_nonfinite=skip")
    assert without_clocks(summary_of(run)) == before


def test_it_gives_up_where_every_step_goes_wrong(place: Workplace, spoiled: Callable[[dict[int, float]], None]) -> None:
    spoiled(dict.fromkeys(range(3, 99), math.nan))
    with pytest.raises(NonFiniteError, match=r"step 5: .*3 steps in a row made no update.*checkpoint of step 4 is kept"):
        place.train("run", *OFTEN, "on_nonfinite=skip", "skip_limit=3")
    assert verified(place.runs / "run/checkpoints/step-00000004").state["guard"]["in_a_row"] == 2


# --- what may change -------------------------------------------------------------------------------------------------

WSD = [*OFTEN, "schedule=wsd", "schedule.warmup_fraction=0.25", "schedule.decay_fraction=0.25"]


def interrupted_at(place: Workplace, name: str, step: int, *more: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was asked to stop in this step."""
    from harness.training.optimizer import Optimizer

    original, calls = Optimizer.step, 0

    def stepping(self: Optimizer) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "step", stepping)
        assert train_model.main(place.overrides(f"name={name}", *more)) == 143
    return place.runs / name


@pytest.mark.parametrize(
    "change",
    [
        ["device=cpu", "compile=off"],
        ["micro_batch_size=2", "evaluation.batch_size=7"],
        ["intervals.checkpoint=3"],
        ["checkpoints.keep=5", "checkpoints.background=false"],
        ["attention.backend=reference"],
        ["tracking=none"],
    ],
)
def test_how_a_run_is_computed_may_change_when_it_is_continued(
    place: Workplace, change: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [*OFTEN, "model.dropout=0"]  # whose draws depend on the micro-batches
    whole = place.train("whole", *plain)
    run = interrupted_at(place, "run", 3, *plain, monkeypatch=monkeypatch)
    assert place.train("run", *plain, *change) == run
    losses, others = ([line["val/loss"] for line in metrics_of(folder) if "val/loss" in line] for folder in (run, whole))
    assert losses == pytest.approx(others, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("seed=1", "seed is 0 there and 1 here"),
        ("data_seed=1", "data_seed is 0 there and 1 here"),
        ("dataset.max_tokens=9000", "dataset.max_tokens is None there and 9000 here"),
        ("model.mlp_hidden=96", "model.mlp_hidden is 64 there and 96 here"),
        ("batch_size=2", "batch_size is 4 there and 2 here"),
        ("optimizer.lr=0.5", "optimizer.lr is 0.003 there and 0.5 here"),
        ("budget.steps=9", "budget.steps is 6 there and 9 here"),
        ("budget.steps=5", "budget.steps is 6 there and 5 here"),
        ("schedule=wsd", "schedule.name is cosine there and wsd here"),
        ("on_nonfinite=skip", "on_nonfinite is stop there and skip here"),
        ("spikes.sigma=6", "spikes.sigma is None there and 6.0"),
    ],
)
def test_what_a_run_is_may_not_change_when_it_is_continued(
    place: Workplace, change: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = interrupted_at(place, "run", 3, *OFTEN, "optimizer.lr=0.003", monkeypatch=monkeypatch)
    before = contents(run)
    with pytest.raises(UserError, match="another configuration") as refused:
        place.train("run", *OFTEN, "optimizer.lr=0.003", change)
    assert sentence in str(refused.value)
    assert contents(run) == before


def test_before_its_rate_falls_a_run_takes_a_larger_budget_and_is_the_run_that_had_it_from_the_start(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 steps, 3 of warm-up, 3 of decay become 16 with 4 of decay; the warm-up stays as long as it was."""
    whole = place.train("whole", *WSD, "budget.steps=16", f"schedule.warmup_fraction={3 / 16}")
    run = interrupted_at(place, "run", 9, *WSD, "budget.steps=12", monkeypatch=monkeypatch)
    place.train("run", *WSD, "budget.steps=16")
    assert load_run_config(run).budget.steps == 16
    ours, theirs = ([without_clocks(line) for line in metrics_of(folder)] for folder in (run, whole))
    assert ours == theirs
    last = "checkpoints/step-00000016/model.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes()


def test_a_budget_that_has_grown_can_grow_again_be_killed_in_between_and_keeps_its_warm_up(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = place.train("whole", *WSD, "budget.steps=20", f"schedule.warmup_fraction={2 / 20}")
    run = interrupted_at(place, "run", 1, *WSD, "budget.steps=8", monkeypatch=monkeypatch)
    tokens = [*WSD, "budget.steps=null", f"budget.tokens={12 * 4 * 32}"]
    interrupted_at(place, "run", 3, *tokens, monkeypatch=monkeypatch)
    place.train("run", *WSD, "budget.steps=20")
    assert [without_clocks(line) for line in metrics_of(run)] == [without_clocks(line) for line in metrics_of(whole)]


def test_once_its_rate_falls_a_run_keeps_its_budget(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted_at(place, "run", 10, *WSD, "budget.steps=12", monkeypatch=monkeypatch)
    before = contents(run)
    with pytest.raises(
        UserError,
        match=r"at step 10 and its rate has been falling since step 9, too late for another "
        r"budget \(budget.steps is 12 there and 16 here\)",
    ):
        place.train("run", *WSD, "budget.steps=16")
    with pytest.raises(UserError, match=r"another configuration \(budget.steps is 12 there and 11 here\)"):
        place.train("run", *WSD, "budget.steps=11")
    with pytest.raises(UserError, match=r"another configuration \(budget.steps is 12 there and 16 here; data_seed is"):
        place.train("run", *WSD, "budget.steps=16", "seed=1")
    assert contents(run) == before


def test_a_finished_run_does_not_grow(place: Workplace) -> None:
    run = place.train("run", *WSD, "budget.steps=8")
    before = contents(run)
    with pytest.raises(UserError, match=r"another configuration \(budget.steps is 8 there and 16 here\)"):
        place.train("run", *WSD, "budget.steps=16")
    assert contents(run) == before


# --- W&B -------------------------------------------------------------------------------------------------------------


def test_online_an_interrupted_run_goes_on_in_its_own_wandb_run(
    place: Workplace, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer() as server:
        server.serves(monkeypatch)
        options = [*OFTEN, "tracking=wandb"]
        run = interrupted_at(place, "run", 3, *options, monkeypatch=monkeypatch)
        recorded = server.only_run()
        assert recorded.exit_code == 1 and [row["step"] for row in recorded.history] == [0, 1, 2, 3]
        place.train("run", *options)
        recorded = server.only_run()
    assert recorded.run_id == summary_of(run)["wandb_id"]
    assert recorded.exit_code == 0 and [row["step"] for row in recorded.history] == list(range(STEPS + 1))
    assert recorded.history == rows_of_steps(run)


def test_offline_the_parts_of_an_interrupted_run_are_parts_of_one_wandb_run(
    place: Workplace, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*OFTEN, "tracking=wandb"]
    run = interrupted_at(place, "run", 3, *options, monkeypatch=monkeypatch)
    kept = verified(run / "checkpoints" / "step-00000003").state["wandb_id"]
    place.train("run", *options)
    parts = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert kept and len(parts) == 2 and all(f"-{kept}" in name for name in parts)
    assert summary_of(run)["wandb_id"] == kept
