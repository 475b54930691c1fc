"""Runs of an arm that share a process: what comes of one does not depend on those before it, and one that fails stops none."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import train_model
from harness.errors import UserError
from harness.study import runner
from harness.study.plan import ArmConfig, RunSpec, StudyConfig, StudyPlan, build_plan
from harness.study.runner import ProcessPool, RunProcess, Slot, process_pool, run_all
from scripts import study_run
from tests.entry.test_kills_of_commands import left
from tests.support.forks import ROOT, Forks
from tests.support.micro import Workplace, without_clocks
from tests.support.switches import LEAKS

pytestmark = pytest.mark.usefixtures("forked")

ONE_THREAD = Slot({"OMP_NUM_THREADS": "1"})
# One setting an arm that a process might keep for the next run.
ARMS = {
    "mha": ["attention=mha", "model.dropout=0.1"],
    "mla": ["attention=mla", "deterministic=true"],
    "gqa": ["attention=gqa", "precision=bfloat16"],
}
# And what is made of another arm's runs.
MADE = {
    "made": ArmConfig(
        family="mla",
        starts_from="mha",
        convert={"method": "transmla", "kv_lora_rank": 16, "qk_rope_head_dim": 8, "calibration_tokens": 2048},
    ),
    "tuned": ArmConfig(family="mla", starts_from="made", overrides=["budget.steps=3"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("processes"))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[RunProcess]:
    """Those that are started."""
    started: list[RunProcess] = []

    class Noted(RunProcess):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

    monkeypatch.setattr(runner, "RunProcess", Noted)
    return started


def micro_plan(place: Workplace, name: str, *, seeds: int, arms: tuple[str, ...] = tuple(ARMS)) -> StudyPlan:
    base = [each for each in place.overrides() if not each.startswith(("runs_dir", "precision"))]
    config = StudyConfig(
        question="which?",
        base=[*base, "optimizer.lr=0.01", "intervals.log=1", "intervals.evaluate=2", "intervals.checkpoint=2"],
        seeds=[*range(seeds)],
        arms={arm: MADE[arm] if arm in MADE else ArmConfig(overrides=ARMS[arm], family=arm) for arm in arms},
        evaluate=["extras=[repeats]", "max_tokens=400"],
    )
    return build_plan(config, name=name, command="", runs_dir=place.runs)


def make_all(place: Workplace, plan: StudyPlan, specs: list[RunSpec], *, places: int = 1) -> list[Any]:
    machine = [each for each in place.places() if not each.startswith(("runs_dir", "precision"))]
    with process_pool([ONE_THREAD] * places) as pool:
        return run_all(plan, specs, pool=pool, evaluate_overrides=machine, title="runs")


def of_runs(folder: Path) -> dict[str, Any]:
    """All that runs have left, weights and optimizer states byte for byte, without clocks and logs."""
    found = left(folder)
    for name in list(found):
        if "/logs/" in f"/{name}" or name.endswith(("/state.json", "/manifest.json", "/config.yaml", "/changes.diff")):
            del found[name]  # seconds, sums of them, the folder's name, the project's state
        elif name.endswith(".jsonl"):
            found[name] = [without_clocks(row) for row in found[name]]
        elif name.endswith(".json"):
            found[name] = without_clocks(found[name])
    return found


def test_a_run_is_the_same_alone_and_after_others_in_its_process(
    place: Workplace, processes: list[RunProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = (*ARMS, *MADE)
    plan = micro_plan(place, "shared", seeds=2, arms=arms)
    specs = [*plan.main_runs(dict.fromkeys(arms, 0.01), arms), *(plan.spec(arm, 0.02, 2, 256) for arm in ARMS)]
    assert make_all(place, plan, specs) == []
    assert [process.arm for process in processes] == [*arms], "one for all runs of an arm"

    processes.clear()
    monkeypatch.setattr(runner, "SHORT_SECONDS", -1.0)
    alone = micro_plan(place, "alone", seeds=2, arms=arms)
    assert make_all(place, alone, specs) == []
    assert len(processes) == len(specs) == 13

    together, apart = of_runs(plan.folder), of_runs(alone.folder)
    assert together.keys() == apart.keys() and sum("safetensors" in name for name in together) >= 13
    for name, content in apart.items():
        assert together[name] == content, name


def test_a_run_is_the_same_after_any_other_in_one_process_and_after_one_that_was_stopped(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a study asks of a process, whose runs are of one arm and which ends with a failed one."""
    whole, plan = micro_plan(place, "whole", seeds=1), micro_plan(place, "mixed", seeds=1)
    specs = whole.main_runs(dict.fromkeys(ARMS, 0.01), ARMS)
    assert make_all(place, whole, specs) == []
    steps = train_model.steps_due

    def stopped(number: int, *arguments: Any) -> bool:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(number, *arguments)

    def makes_all(*_: Any) -> int:
        for spec in reversed(specs):
            with monkeypatch.context() as patched:
                patched.setattr(train_model, "steps_due", stopped)
                assert train_model.main(plan.overrides(spec)) == 143
            broken = [*plan.overrides(spec), "name=broken", "init_from=nowhere"]
            with pytest.raises(UserError, match="nowhere"):
                train_model.main(broken)
        for spec in reversed(specs):
            assert make_run(plan.overrides(spec), evaluation(place, plan, spec)) == 0
        return 0

    make_run = study_run.make_run
    monkeypatch.setattr(study_run, "make_run", makes_all)
    with process_pool([ONE_THREAD]) as pool:
        assert status_of(pool, place, plan, specs[0]) == 0
    mixed = of_runs(plan.folder)
    for name, content in of_runs(whole.folder).items():
        assert mixed[name] == content, name


def evaluation(place: Workplace, plan: StudyPlan, spec: RunSpec) -> list[str]:
    machine = [each for each in place.places() if not each.startswith(("runs_dir", "precision"))]
    return [f"run={spec.name}", f"runs_dir={plan.folder}", *plan.config.evaluate, *machine]


def start(pool: ProcessPool, place: Workplace, plan: StudyPlan, spec: RunSpec) -> Path:
    """Its log."""
    log = plan.folder / f"{spec.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    pool.start(spec, log, make=plan.overrides(spec), evaluate=evaluation(place, plan, spec))
    return log


def end(pool: ProcessPool) -> int:
    """The status of the run under way, whose arm has more."""
    deadline = time.monotonic() + 120
    while not (ended := pool.ended(ARMS)):
        assert time.monotonic() < deadline
    ((_, status, _),) = ended
    return status


def status_of(pool: ProcessPool, place: Workplace, plan: StudyPlan, spec: RunSpec) -> int:
    start(pool, place, plan, spec)
    return end(pool)


@pytest.mark.parametrize("more", [[], ["deterministic=true"], ["precision=bfloat16", "optimizer=muon"], ["tracking=wandb"]])
def test_a_run_leaves_no_switch_otherwise_than_it_found_it(tmp_path: Path, forks: Forks, more: list[str]) -> None:
    first, second = left_by_runs(tmp_path, forks, more, leak=False)
    # A process's runs are of one arm, which has these alike, and each run sets them; modules register what they do in the end.
    own = [name for name in first["moved"] if "determin" in name or "CUBLAS" in name or name == "atexit"]
    assert ("environment CUBLAS_WORKSPACE_CONFIG" in own) == ("deterministic=true" in more)
    assert first == {"status": 0, "moved": own}
    # wandb's client registers for each run what then finds it finished.
    assert second == {"status": 0, "moved": ["atexit"] if more == ["tracking=wandb"] else []}


def test_a_switch_that_a_run_leaves_is_named(tmp_path: Path, forks: Forks) -> None:
    _, second = left_by_runs(tmp_path, forks, [], leak=True)
    assert second["status"] == 0
    assert LEAKS.keys() - second["moved"] == set()


def left_by_runs(folder: Path, forks: Forks, more: list[str], *, leak: bool) -> list[dict[str, Any]]:
    place = Workplace(folder)
    request, answer = folder / "request.json", folder / "answer.json"
    make = place.overrides("name={name}", "seed={seed}", *more)
    evaluate = ["run={name}", f"runs_dir={place.runs}", f"data_dir={place.folder / 'data'}", "tracking=none", "device=cpu"]
    request.write_text(json.dumps({"make": make, "evaluate": [*evaluate, "max_tokens=400"], "leak": leak}))
    ended = forks.run(
        ROOT / "tests" / "support" / "switches.py", str(request), str(answer), environment={"WANDB_MODE": "offline"}
    )
    assert ended.status == 0, ended.errors
    found: list[dict[str, Any]] = json.loads(answer.read_text())
    return found


def test_each_run_has_its_own_log_for_all_that_the_process_says(
    place: Workplace, processes: list[RunProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(make: list[str], _: object) -> int:
        (name,) = (word.partition("=")[2] for word in make if word.startswith("name="))
        print(f"printed by {name}", flush=True)
        os.write(1, f"native output of {name}\n".encode())
        os.write(2, f"native error of {name}\n".encode())
        return 0

    monkeypatch.setattr(study_run, "make_run", says)
    plan = micro_plan(place, "logs", seeds=2, arms=("mha",))
    with process_pool([ONE_THREAD]) as pool:
        for spec in plan.main_runs({"mha": 0.01}, ["mha"]):
            log = start(pool, place, plan, spec)
            assert end(pool) == 0
            said = [f"printed by {spec.name}", f"native output of {spec.name}", f"native error of {spec.name}"]
            assert log.read_text().splitlines() == said
    assert len(processes) == 1


def test_a_run_that_fails_or_is_killed_ends_its_process_and_the_next_has_a_new_one(
    place: Workplace, processes: list[RunProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    endings = {0: lambda: os.kill(os.getpid(), signal.SIGKILL), 1: lambda: study_run.made_up, 2: lambda: 7, 3: lambda: 0}  # type: ignore[attr-defined]

    def fails(make: list[str], _: object) -> Any:
        (seed,) = (word.partition("=")[2] for word in make if word.startswith("seed="))
        return endings[int(seed)]()

    monkeypatch.setattr(study_run, "make_run", fails)
    plan = micro_plan(place, "fails", seeds=4, arms=("mha",))
    specs = plan.main_runs({"mha": 0.01}, ["mha"])
    with process_pool([ONE_THREAD]) as pool:
        assert [status_of(pool, place, plan, spec) for spec in specs] == [-signal.SIGKILL, 1, 7, 0]
        assert len(processes) == 4
        error = runner.last_words(plan.folder / f"{specs[1].name}.log", 1)
        assert error.startswith("AttributeError: module 'scripts.study_run' has no attribute 'made_up'")
        os.kill(processes[-1].process.pid, signal.SIGKILL)  # one that waits fails no run
        time.sleep(0.5)
        assert status_of(pool, place, plan, specs[3]) == 0
        assert len(processes) == 5
        os.kill(processes[-1].process.pid, signal.SIGSTOP)  # killed before it has looked at its next run
        (plan.folder / f"{specs[3].name}.log").unlink()
        log = start(pool, place, plan, specs[3])
        os.kill(processes[-1].process.pid, signal.SIGKILL)
        assert end(pool) == -signal.SIGKILL and "it said nothing" in runner.last_words(log, -signal.SIGKILL)
        assert status_of(pool, place, plan, specs[3]) == 0
        assert len(processes) == 6
        monkeypatch.setattr(runner, "changed_since", lambda moment: moment < time.time())
        assert status_of(pool, place, plan, specs[3]) == 0
        assert len(processes) == 7, "and one whose code is no longer the project's makes no more runs"


def test_a_run_that_ends_just_when_it_is_told_to_stop_holds_nothing_up(
    place: Workplace, processes: list[RunProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: object) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as after the last look at whether it should stop
        print("at its end", flush=True)
        time.sleep(1.0)
        return 0

    monkeypatch.setattr(study_run, "make_run", ends)
    monkeypatch.setattr(runner, "GRACE_SECONDS", 60.0)
    plan = micro_plan(place, "ends", seeds=1, arms=("mha",))
    with process_pool([ONE_THREAD]) as pool:
        log = start(pool, place, plan, plan.spec("mha", 0.01, 0))
        while not log.read_text():
            time.sleep(0.01)
        begun = time.monotonic()
    assert processes[0].process.returncode == 0 and time.monotonic() - begun < 30


def test_seeds_are_made_in_turn_and_processes_wait_for_their_arms(
    place: Workplace, processes: list[RunProcess], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_run, "make_run", lambda make, evaluate: 0)
    plan = micro_plan(place, "turns", seeds=3)
    specs = plan.main_runs(dict.fromkeys(ARMS, 0.01), ARMS)
    for most, started in ((8, 3), (2, 5), (1, 7)):
        processes.clear()
        monkeypatch.setattr(runner, "PROCESSES", most)
        assert len(make_all(place, plan, specs)) == 9  # none has left a run
        seeds = re.findall(r"^started \w+-lr0.01-seed(\d);", capfd.readouterr().out, flags=re.M)
        assert seeds == sorted(seeds) and len(seeds) == 9, "a study cut short has its first seeds whole"
        assert len(processes) == started
        assert all(process.process.returncode is not None for process in processes), "none is left"
