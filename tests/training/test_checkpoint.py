"""A checkpoint is whole and verified or it is not used; a resumed run cannot be told from an uninterrupted one."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from harness.errors import UserError
from harness.training import checkpoint
from harness.training.checkpoint import best_checkpoint, keep_as_best, latest_checkpoint, load_checkpoint, tidy, verified
from harness.training.loop import train
from harness.training.optimizer import OPTIMIZERS, Optimizer, Recipe, build_optimizer
from harness.training.parallel import OneProcess
from harness.training.schedule import Schedule
from harness.training.step import EagerStep
from tests.support.forks import Forks
from tests.support.mutations import flip, truncate
from tests.support.tiny_model import TinyModel, find_damage, optimizer_config, save_checkpoint, tiny_batches, tiny_model
from tests.support.variants import gpt_from

FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def _save(folder: Path, step: int, *, seed: int = 0, **options: Any) -> Path:
    model = tiny_model(seed)
    optimizer = build_optimizer(model, optimizer_config())
    _steps(model, optimizer, 1, 1, total=9)
    state = {"step": step, "tokens": 54 * step}
    return save_checkpoint(folder, model=model, optimizer=optimizer, state=state, **options)


def newest(folder: Path) -> Path | None:
    found = latest_checkpoint(folder)
    return None if found is None else found.path


def _steps(model: nn.Module, optimizer: Optimizer, first: int, last: int, *, total: int) -> list[float]:
    from harness.config.schema import ScheduleConfig

    step_by = EagerStep(
        OneProcess(model),
        optimizer,
        micro_batch_size=4,
        grad_clip=1.0,
        precision=torch.float32,
        compile=False,
        device=torch.device("cpu"),
    )
    schedule = Schedule(ScheduleConfig("cosine", 0.1, 0.1), total)
    steps = train(step_by, tiny_batches(first), schedule=schedule, first_step=first, last_step=last)
    return [step.loss for step in steps]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["tiny", "gpt"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path, name: str, kind: str) -> None:
    """Twelve steps with dropout on, against six, everything thrown away, six more."""

    def fresh(seed: int) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(seed)
        model = TinyModel() if kind == "tiny" else gpt_from(["attention=mla", "model.dropout=0.1"], vocab_size=11)
        return model, build_optimizer(model, optimizer_config(name))

    model, optimizer = fresh(0)
    losses = _steps(model, optimizer, 1, 12, total=12)
    assert len(set(losses)) == 12

    first, first_optimizer = fresh(0)
    again = _steps(first, first_optimizer, 1, 6, total=12)
    save_checkpoint(tmp_path, model=first, optimizer=first_optimizer, state={"step": 6, "note": "here"})
    torch.manual_seed(99)

    second, second_optimizer = fresh(7)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    load_checkpoint(found, model=second, optimizer=second_optimizer)
    assert found.state == {"step": 6, "note": "here"}
    again += _steps(second, second_optimizer, found.state["step"] + 1, 12, total=12)

    assert again == losses
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


class Signs(torch.optim.Optimizer):
    """Written as briefly as it goes: no decay in its groups, and a state in no parameter's shape."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["seen"] = state.get("seen", self.first()) + 1
                p.add_(p.grad.sign(), alpha=-group["lr"] / float(state["seen"]))

    def first(self) -> Any:
        return torch.zeros(1)


class Counting(Signs):
    def first(self) -> Any:
        return 0


def recipe_of(kind: Callable[..., torch.optim.Optimizer]) -> Recipe:
    return Recipe(
        lambda config: None, lambda weights, config, capturable: [kind([*weights.vectors, *weights.matrices], lr=0.01)]
    )


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Rprop, Signs])
def test_an_optimizer_of_any_state_goes_on_as_if_it_had_not_been_stopped(
    kind: Callable[..., torch.optim.Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adafactor keeps rows and columns of a matrix and one number an element of a vector, Rprop knows no decay."""
    monkeypatch.setitem(OPTIMIZERS, "added", recipe_of(kind))

    def fresh(seed: int) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(seed)
        model = gpt_from(["attention=mla"], vocab_size=11)
        return model, build_optimizer(model, dataclasses.replace(optimizer_config(), name="added"))

    whole = _steps(*fresh(0), 1, 6, total=6)
    model, optimizer = fresh(0)
    halves = _steps(model, optimizer, 1, 3, total=6)
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, state={"step": 3})
    model, optimizer = fresh(7)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    load_checkpoint(found, model=model, optimizer=optimizer)
    assert halves + _steps(model, optimizer, 4, 6, total=6) == whole


def test_a_state_that_no_checkpoint_can_hold_is_known_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "added", recipe_of(Counting))
    with pytest.raises(TypeError, match="Counting keeps seen as a int, and a checkpoint holds tensors"):
        build_optimizer(tiny_model(), dataclasses.replace(optimizer_config(), name="added"))


def test_every_global_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    def draw() -> list[float]:
        numpy = [float(np.random.rand()), float(np.random.randn())]
        return [random.random(), random.gauss(0.0, 1.0), *numpy, torch.rand(()).item()]

    model = tiny_model()
    optimizer = build_optimizer(model, optimizer_config())
    draw()  # leaves half of a pair in both gauss caches
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, state={"step": 1})
    expected = draw()
    load_checkpoint(verified(path), model=model, optimizer=None)
    assert draw() != expected, "loading weights alone leaves the generators as they are"
    load_checkpoint(verified(path), model=model, optimizer=optimizer)
    assert draw() == expected


def test_a_checkpoint_is_four_files_of_tensors_and_json(tmp_path: Path) -> None:
    path = _save(tmp_path, 100)
    assert path == tmp_path / "step-00000100"
    assert {file.name for file in path.iterdir()} == FILES
    assert json.loads((path / "state.json").read_text())["caller"] == {"step": 100, "tokens": 5400}
    names = safetensors.torch.load_file(path / "optimizer.safetensors").keys()
    assert "exp_avg/embedding.weight" in names and "exp_avg_sq/blocks.0.bias" in names


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    assert "head.weight" not in safetensors.torch.load_file(path / "model.safetensors")
    model = tiny_model(seed=3)
    load_checkpoint(verified(path), model=model, optimizer=None)
    assert model.head.weight is model.embedding.weight
    saved = safetensors.torch.load_file(path / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


def test_no_checkpoint_is_none_and_a_half_written_one_does_not_count(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    path = _save(tmp_path / "elsewhere", 1)
    path.rename(folder / ".partial-step-00000001")  # what a save leaves that was killed before its rename
    assert latest_checkpoint(folder) is None
    _save(folder, 2)
    assert [file.name for file in folder.iterdir()] == ["step-00000002"], "the next save clears it away"


def test_only_exactly_our_names_count_and_are_deleted(tmp_path: Path) -> None:
    folder, path = tmp_path / "checkpoints", _save(tmp_path / "checkpoints", 2)
    copies = (
        "step-00000002.backup",
        "step-00000010 copy",
        "step-10",
        "step-000000010",
        ".partial-mine",
        "best-of-all",
        ".partial-step-00000002.backup",
        "step-99999999999 2",
    )
    for name in copies:
        shutil.copytree(path, folder / name)
    assert newest(folder) == path
    for step in (3, 4, 99_999_999, 100_000_000):  # the last one's name is longer, and sorts before the others as text
        assert _save(folder, step, keep=1) == newest(folder)
    assert {file.name for file in folder.iterdir()} == {*copies, "step-100000000"}
    assert all(find_damage(folder / name) is None or "another one's" in str(find_damage(folder / name)) for name in copies)


def test_checkpoints_that_were_written_and_are_not_there_are_missing_and_not_none(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert latest_checkpoint(folder) is None
    _save(folder, 1)
    folder.rename(tmp_path / "elsewhere")
    for make in (lambda: None, folder.mkdir):  # the second: as where a disk is not mounted
        make()
        with pytest.raises(UserError, match=r"holds no checkpoint, and this run has written some: bring them back"):
            latest_checkpoint(folder)
    folder.rmdir()
    (tmp_path / "elsewhere").rename(folder)
    assert newest(folder) == folder / "step-00000001"


def _as_written(checkpoint: Path, file: str, content: bytes) -> None:
    """Other content, and a manifest that fits it."""
    (checkpoint / file).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b"[" * 100_000),
        ("state.json", b"[]"),
        ("state.json", b'{"caller": 3, "optimizer": null}'),
        ("state.json", b'{"caller": {"step": "2"}, "optimizer": null, "generators": null}'),
        ("state.json", b'{"caller": {"step": -2}, "optimizer": null, "generators": null}'),
        ("state.json", b'{"caller": {"step": 1e308}, "optimizer": null, "generators": null}'),
        ("state.json", b'{"caller": {"step": 3}, "optimizer": null, "generators": null}'),
        ("state.json", b'{"caller": {"step": 2}, "optimizer": 5, "generators": {}}'),
        ("state.json", b'{"caller": {"step": 2}, "optimizer": [], "generators": 5}'),
        ("state.json", b'{"caller": {"step": 2}}'),
        ("model.safetensors", _header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
        ("optimizer.safetensors", _header(b'{"a":' * 100_000)),
        ("model.safetensors", b"\0"),
    ],
)
def test_content_that_no_save_wrote_is_damage_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes
) -> None:
    older, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    _as_written(newer, file, content)
    assert newest(tmp_path) == older
    (report,) = capsys.readouterr().err.splitlines()
    assert f"{newer} is damaged ({file}" in report
    with pytest.raises(UserError, match=r"is damaged .*: use another one$"):
        verified(newer)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Any
) -> None:
    older, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    assert newest(tmp_path) == newer
    damage(newer / name)
    assert newest(tmp_path) == older
    report = capsys.readouterr().err
    assert str(newer) in report and "damaged" in report
    with pytest.raises(UserError, match="damaged"):
        verified(newer)
    assert newer.exists(), "nothing was deleted"


def test_when_all_are_damaged_it_stops_and_deletes_nothing(tmp_path: Path) -> None:
    paths = [_save(tmp_path, step) for step in (1, 2)]
    for path in paths:
        flip(path / "model.safetensors")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged .*overwrite=true"):
        latest_checkpoint(tmp_path)
    assert all({file.name for file in path.iterdir()} == FILES for path in paths)


def test_the_newest_two_are_kept_and_the_one_just_written_always(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]

    # Both are damaged, the run goes on from elsewhere and saves an earlier step: that one is the only good one.
    for path in tmp_path.iterdir():
        flip(path / "model.safetensors")
    path = _save(tmp_path, 1, keep=1)
    assert path.exists() and newest(tmp_path) == path


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = _save(tmp_path, 5, seed=0)
    flip(path / "model.safetensors")
    assert _save(tmp_path, 5, seed=1) == path
    model = tiny_model(seed=2)
    load_checkpoint(verified(path), model=model, optimizer=None)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_that_went_away_after_it_was_verified_is_said_to_be_missing(tmp_path: Path) -> None:
    found = verified(_save(tmp_path, 1))
    shutil.rmtree(found.path)
    with pytest.raises(UserError, match=r"step-00000001 is damaged \(model.safetensors is missing\)"):
        load_checkpoint(found, model=tiny_model(), optimizer=None)


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    model = tiny_model(seed=1, tie=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"another model: head.weight is absent there and \(11, 8\) here"):
        load_checkpoint(verified(path), model=model, optimizer=None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", [optimizer_config("muon"), optimizer_config(lr=0.02), optimizer_config(weight_decay=0.0)])
def test_other_optimizer_settings_are_refused_and_change_nothing(tmp_path: Path, config: Any) -> None:
    path = _save(tmp_path, 1)
    model = tiny_model(seed=1)
    before = model.head.weight.clone()
    with pytest.raises(UserError, match="other optimizer settings"):
        load_checkpoint(verified(path), model=model, optimizer=build_optimizer(model, config))
    assert torch.equal(model.head.weight, before)


def test_a_best_checkpoint_that_is_replaced_while_it_is_read_is_no_mixture_of_two(tmp_path: Path) -> None:
    model = tiny_model(seed=5)
    before = model.head.weight.clone()
    keep_as_best(_save(tmp_path, 4, seed=1))
    best = best_checkpoint(tmp_path)
    assert best is not None and best.state["step"] == 4
    keep_as_best(_save(tmp_path, 8, seed=2))
    with pytest.raises(
        UserError, match=r"best was replaced while it was read, by a run that trains on: start the command again"
    ):
        load_checkpoint(best, model=model, optimizer=None)
    assert torch.equal(model.head.weight, before)
    newer = best_checkpoint(tmp_path)
    assert newer is not None
    load_checkpoint(newer, model=model, optimizer=None)
    assert newer.state["step"] == 8 and not torch.equal(model.head.weight, before)


def test_a_disk_too_full_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = _save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes and the disk of .* has 1,000 free: make room"):
        _save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [older.name]


def test_a_write_that_fails_half_way_leaves_the_older_checkpoint_and_no_stump(tmp_path: Path) -> None:
    older = _save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))  # bytes a file: the kernel refuses the rest
    try:
        with pytest.raises(Exception, match=r"os error 27|File too large"):
            _save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
    assert find_damage(older) is None


ENDLESS_SAVES = """
import sys, torch
from pathlib import Path
from harness.training.optimizer import build_optimizer
from tests.support.tiny_model import optimizer_config, save_checkpoint, tiny_model
model = tiny_model()
optimizer = build_optimizer(model, optimizer_config())
step = 0
while True:
    step += 1
    save_checkpoint(Path(sys.argv[1]), model=model, optimizer=optimizer, state={"step": step})
"""


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        _save(tmp_path, step)

    def cut_off(path: Path) -> None:
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            _save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert all(find_damage(path) is None for path in tmp_path.glob("step-*"))
    _save(tmp_path, 4)  # and what was left is cleared away
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_process_killed_while_it_saves_leaves_whole_checkpoints_only(tmp_path: Path, forks: Forks) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS_SAVES)
    child = forks.start(script, str(tmp_path), streams=[os.devnull] * 3)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.random() / 5)
    child.send_signal(signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    assert all(find_damage(path) is None for path in tmp_path.glob("step-*"))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    load_checkpoint(found, model=tiny_model(), optimizer=None)
    assert found.state["step"] >= 1


def test_a_folder_that_goes_away_while_a_checkpoint_is_written_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone_by_then(place: Path) -> None:  # as Python's own, where another process is faster: with the bare name of a file
        rmtree(tmp_path)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "model.safetensors")

    def full(place: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))

    rmtree = shutil.rmtree
    _save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", gone_by_then)
        patched.setattr(checkpoint, "flush", full)
        with pytest.raises(OSError, match="No space left") as told:
            _save(tmp_path, 2)
    assert str(told.value.filename).startswith(str(tmp_path))
    tidy(tmp_path, newest=tmp_path / "step-00000002", keep=1)
    assert not tmp_path.exists()


def test_a_folder_in_whose_place_another_one_is_by_now_is_not_said_to_have_had_checkpoints(tmp_path: Path) -> None:
    written = tmp_path / "run" / "checkpoints"
    written.mkdir(parents=True)
    saved = _save(written, 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    written.mkdir(parents=True)
    tidy(written, newest=saved, keep=1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
