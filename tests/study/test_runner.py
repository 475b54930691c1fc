"""The runner under failure: what is finished is never repeated, what fails stops nothing, what is killed leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import TrainConfig
from harness.errors import UserError
from harness.runs.records import DecodeRow
from harness.study import decode_times
from harness.study.plan import ArmConfig, StudyConfig, StudyPlan, TuneConfig, build_plan
from harness.study.results import load_results
from harness.study.runner import Slot, is_done, last_words, process_pool, run_all, slots, tuned
from scripts import run_study
from tests.support.forks import Forks, wait_for
from tests.support.micro import Workplace, summary_of

pytestmark = pytest.mark.usefixtures("forked")

ONE_THREAD = Slot({"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("study"))


def micro_plan(place: Workplace, name: str, *, tokens: int = 4 * 32 * 6) -> StudyPlan:
    base = [o for o in place.overrides() if not o.startswith(("runs_dir", "budget"))]
    config = StudyConfig(
        question="which?",
        base=[*base, f"budget.tokens={tokens}", "optimizer.lr=0.01"],
        seeds=[0],
        arms={arm: ArmConfig(overrides=[f"attention={arm}"], family=arm) for arm in ("mha", "mqa")},
        contrasts=[["mqa", "mha"]],
        evaluate=["extras=[]", "max_tokens=400"],
        tune=TuneConfig(factors=[0.5, 1.0, 2.0], extensions=0, tokens=4 * 32 * 2),
    )
    return build_plan(config, name=name, command="", runs_dir=place.runs)


def carried_out(command: run_study.Command) -> int:
    return run_study.run_study(command, command.places)


def run(place: Workplace, plan: StudyPlan, specs: list) -> list:  # type: ignore[type-arg]
    machine = [o for o in place.places() if not o.startswith("runs_dir")]
    with process_pool([ONE_THREAD, ONE_THREAD]) as pool:
        return run_all(plan, specs, pool=pool, evaluate_overrides=machine, title="runs")


def test_a_failed_run_is_reported_and_stops_nothing_and_what_is_finished_is_not_repeated(
    place: Workplace, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = micro_plan(place, "failing")
    specs = plan.main_runs({"mha": 0.01, "mqa": 0.01}, plan.arms)
    broken = plan.folder / "mha-lr0.01-seed0"
    broken.mkdir(parents=True)
    (broken / "letter.txt").write_text("not a run")
    (failure,) = run(place, plan, specs)
    assert failure["run"] == "mha-lr0.01-seed0"
    assert "exists and is no run (it has no config.yaml)" in failure["error"]
    assert is_done(plan, specs[1])
    assert "[2/2]" in capfd.readouterr().out
    (scored,) = (plan.folder / "mqa-lr0.01-seed0" / "evaluations").glob("*.json")
    record = scored.read_text()
    for field, other in (("split", "validation"), ("dataset", "my-test-text"), ("through_cache", True)):
        scored.write_text(json.dumps(json.loads(record) | {field: other}))
        assert not is_done(plan, specs[1]), "what judges a run is its record, not the name of a file"
    scored.write_text(record)

    finished = plan.folder / "mqa-lr0.01-seed0" / "summary.json"
    before = finished.stat().st_mtime_ns
    (broken / "letter.txt").unlink()
    assert run(place, plan, specs) == []
    assert finished.stat().st_mtime_ns == before
    assert "1 of 2 runs are finished already" in capfd.readouterr().out
    assert run(place, plan, specs) == []


def test_a_repeated_study_whose_text_has_changed_is_refused_before_it_mixes_old_and_new(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    plan = micro_plan(place, "repeated")
    specs = plan.main_runs({"mha": 0.01, "mqa": 0.01}, plan.arms)
    assert run(place, plan, specs[:1]) == []
    text = place.corpus.read_text()
    place.corpus.write_text(text + "\nand one line more")
    with pytest.raises(UserError, match=rf"is not what .*{specs[0].name} was trained on; bring that data back"):
        run(place, plan, specs)
    assert not (plan.folder / specs[1].name).exists()
    place.corpus.write_text(text)
    assert run(place, plan, specs[:1]) == []


def test_converted_arms_wait_for_their_source_and_fall_with_it(place: Workplace) -> None:
    base = [o for o in place.overrides() if not o.startswith(("runs_dir", "budget"))]
    options = {"method": "transmla", "kv_lora_rank": 16, "qk_rope_head_dim": 8, "calibration_tokens": 2048}
    config = StudyConfig(
        question="which?",
        base=[*base, f"budget.tokens={4 * 32 * 6}", "optimizer.lr=0.01"],
        seeds=[0],
        arms={
            "tuned": ArmConfig(family="mla", starts_from="made", overrides=["optimizer.lr=0.001", "budget.tokens=256"]),
            "made": ArmConfig(family="mla", starts_from="mha", convert=options),
            "mha": ArmConfig(family="mha", overrides=["attention=mha"]),
        },
        evaluate=["extras=[]", "max_tokens=400"],
    )
    plan = build_plan(config, name="started", command="", runs_dir=place.runs)
    specs = plan.main_runs(plan.untuned_rates(plan.arms), plan.arms)
    broken = plan.folder / "mha-lr0.01-seed0"
    broken.mkdir(parents=True)
    (broken / "letter.txt").write_text("not a run")
    failures = run(place, plan, specs)
    assert [failure["run"] for failure in failures] == ["mha-lr0.01-seed0", "tuned-lr0.001-seed0", "made-lr0.01-seed0"]
    assert "whose weights it starts from, mha-lr0.01-seed0, is not finished" in failures[2]["error"]
    (broken / "letter.txt").unlink()
    assert run(place, plan, specs) == []
    made, tuned_run = (summary_of(plan.folder / name) for name in ("made-lr0.01-seed0", "tuned-lr0.001-seed0"))
    assert made["cache_elements_per_token_per_layer"] == tuned_run["cache_elements_per_token_per_layer"] == 24
    assert (made["tokens"], tuned_run["tokens"], tuned_run["initial_tokens"]) == (4 * 32 * 6, 256, 4 * 32 * 6)


def test_a_sweep_gives_every_arm_the_same_rates_and_its_own_optimum(place: Workplace) -> None:
    plan = micro_plan(place, "swept")
    rates = tuned(plan, list(plan.arms), lambda wanted: run(place, plan, list(wanted)))
    assert rates.failures == []
    assert {(spec.arm, spec.lr) for spec in rates.sweep} == {(arm, lr) for arm in plan.arms for lr in (0.005, 0.01, 0.02)}
    assert all(spec.tokens == summary_of(plan.folder / spec.name)["tokens"] == 256 for spec in rates.sweep)
    assert rates.chosen.keys() == plan.arms.keys()
    assert all(0.005 <= rate <= 0.02 for rate in rates.chosen.values())


def test_a_command_for_some_arms_keeps_what_another_found_for_the_others(place: Workplace) -> None:
    plan = micro_plan(place, "in_parts")
    machine = [o for o in place.places() if not o.startswith("runs_dir")]

    def command(arms: list[str], tune: str) -> dict[str, Any]:
        assert carried_out(run_study.Command(plan, arms, tune, run_study.StudyOptions(report=False, jobs=2), machine)) == 0
        record: dict[str, Any] = json.loads((plan.folder / "study.json").read_text())
        return record

    first = command(["mha"], "lr")
    both = command(["mqa"], "lr")
    assert both["chosen_lr"] == first["chosen_lr"] | {"mqa": both["chosen_lr"]["mqa"]}
    assert {run["arm"] for run in both["sweep"]} == {run["arm"] for run in both["runs"]} == {"mha", "mqa"}
    again = command(["mha", "mqa"], "stored")
    assert again["chosen_lr"] == both["chosen_lr"]
    assert sorted(run["name"] for run in again["runs"]) == sorted(run["name"] for run in both["runs"])
    assert sorted(run["name"] for run in again["sweep"]) == sorted(run["name"] for run in both["sweep"])
    assert len(load_results(plan.folder).sweep) == 6


def test_one_seed_a_command_ends_in_a_study_of_all_of_them(place: Workplace) -> None:
    machine = [o for o in place.places() if not o.startswith("runs_dir")]
    for seed in (1, 0):
        plan = micro_plan(place, "by_seed")
        plan.config.seeds[:] = [seed]
        options = run_study.StudyOptions(report=False, jobs=2)
        assert carried_out(run_study.Command(plan, ["mha", "mqa"], "none", options, machine)) == 0
    results = load_results(plan.folder)
    assert {arm: sorted(seeds) for arm, seeds in results.values().items()} == {"mha": [0, 1], "mqa": [0, 1]}
    assert results.missing == 0


def test_an_arm_whose_whole_sweep_fails_stops_no_other_arm(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    plan = micro_plan(place, "lost_arm")
    for spec in [plan.spec("mqa", lr, plan.tuning_seed, 4 * 32 * 2) for lr in (0.005, 0.01, 0.02)]:
        (plan.folder / spec.name).mkdir(parents=True)
        (plan.folder / spec.name / "letter.txt").write_text("not a run")
    machine = [o for o in place.places() if not o.startswith("runs_dir")]
    with pytest.raises(UserError, match="3 of 7 runs of lost_arm failed, the others are finished"):
        carried_out(run_study.Command(plan, ["mha", "mqa"], "lr", run_study.StudyOptions(report=False, jobs=2), machine))
    said = capsys.readouterr().out
    assert "mqa: no run of its sweep has finished, so it has no rate and no runs" in said
    line = next(line for line in said.splitlines() if line.startswith("{"))
    assert len(line) <= 1024 and json.loads(line)["failures"] == 3
    record = json.loads((plan.folder / "study.json").read_text())
    assert record["chosen_lr"].keys() == {"mha"}
    assert len(record["failures"]) == 3 and all("is no run" in failure["error"] for failure in record["failures"])
    assert load_results(plan.folder).values().keys() == {"mha"}


def test_where_every_run_fails_the_failures_are_told_and_not_that_there_is_no_report(place: Workplace) -> None:
    plan = micro_plan(place, "all_fail")
    for spec in plan.main_runs({"mha": 0.01, "mqa": 0.01}, plan.arms):
        (plan.folder / spec.name).mkdir(parents=True)
        (plan.folder / spec.name / "letter.txt").write_text("not a run")
    machine = [o for o in place.places() if not o.startswith("runs_dir")]
    with pytest.raises(UserError, match=r"all 2 runs of all_fail failed: .* exists and is no run"):
        carried_out(run_study.Command(plan, ["mha", "mqa"], "none", run_study.StudyOptions(jobs=2), machine))


def test_what_cannot_be_decoded_leaves_the_runs_their_report(place: Workplace) -> None:
    plan = micro_plan(place, "too_long")
    plan.config.decode_contexts = [2_000_000_000]
    machine = [o for o in place.places() if not o.startswith("runs_dir")]
    with pytest.raises(UserError, match=r"report of too_long is written without decode times: .* takes .* GB and this machine"):
        carried_out(run_study.Command(plan, ["mha", "mqa"], "none", run_study.StudyOptions(jobs=2), machine))
    assert (plan.folder / "report.html").is_file() and not (plan.folder / "decode.json").exists()


def test_decoding_is_timed_once_until_other_arms_or_places_are_asked_for(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, timed = micro_plan(place, "timed"), []

    def time_them(configs: dict[str, TrainConfig], *, contexts: list[int], **_: object) -> list[DecodeRow]:
        timed.append((*configs, *contexts))
        return []

    monkeypatch.setattr(decode_times, "decode_times", time_them)
    plan.folder.mkdir(parents=True)
    (plan.folder / "decode.json").write_text('{"rows": []}')  # older: what was asked for is not known
    run_study.measure_decoding(plan)
    assert timed == []
    (plan.folder / "decode.json").unlink()
    for contexts in ([16, 8], [8, 16], [8]):
        plan.config.decode_contexts = contexts
        run_study.measure_decoding(plan)
    assert timed == [(*plan.arms, 8, 16), (*plan.arms, 8)]
    del plan.arms["mqa"]
    run_study.measure_decoding(plan)
    assert timed[2:] == [("mha", 8)]


def test_a_copied_run_counts_if_it_is_the_planned_one_and_is_refused_if_not(place: Workplace, tmp_path: Path) -> None:
    plan = micro_plan(place, "copied")
    spec = plan.spec("mqa", 0.01, 0)
    folder = plan.folder / spec.name
    (folder / "evaluations").mkdir(parents=True)
    figures = dict.fromkeys(("evaluated_tokens", "loss", "perplexity", "bits_per_byte"), 1)
    record = {"dataset": "local", "split": "test", "data_fingerprint": "d", **figures}
    (folder / "evaluations" / "local-test-0.json").write_text(json.dumps(record))
    summary = {"setup_hash": spec.setup_hash, "seed": 0, "dataset": "local"}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert is_done(plan, spec)
    (folder / "summary.json").write_text(json.dumps(summary | {"setup_hash": "another"}))
    with pytest.raises(UserError, match="is a run of another setup than this study's arm mqa"):
        is_done(plan, spec)


def test_places_are_one_a_gpu_or_several_and_on_a_cpu_share_the_cores() -> None:
    two = [{"CUDA_VISIBLE_DEVICES": gpu, "TORCHINDUCTOR_COMPILE_THREADS": "2"} for gpu in ("0", "1")]
    assert slots(["0", "1"], jobs=None, cores=8) == [Slot(environment) for environment in two]
    assert slots(["0"], jobs=None, cores=8) == [Slot({"CUDA_VISIBLE_DEVICES": "0"})]
    assert slots(["0"], jobs=9, cores=8)[0].environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots(["0", "3"], jobs=2, cores=8)] == ["0", "3", "0", "3"]
    assert slots([], jobs=None, cores=8) == [Slot({})]
    assert slots([], jobs=2, cores=8) == [Slot({"OMP_NUM_THREADS": "4"})] * 2


# A study whose runs are forked, see tests/support/small_study.py.
FORKED = """
import sys
from harness.config.places import CONFIGS
from tests.support.small_study import main
sys.exit(main([str(CONFIGS), *sys.argv[1:]]))
"""


def ended_in_its_second_run(forks: Forks, place: Workplace, number: signal.Signals) -> tuple[int, str]:
    """The status of the command of a study of three runs that got this signal, and what it said; no run has outlived it."""
    script = place.folder / "forked.py"
    script.write_text(FORKED)
    machine = [o for o in place.overrides() if not o.startswith(("runs_dir", "budget"))]
    runs = ["arms=mha,mqa,mla", "tune=none", "seeds=0", "budget.tokens=32768", "intervals.checkpoint=16"]
    where = ["report=false", "name=killed", f"runs_dir={place.runs}"]
    said = place.folder / "said.txt"
    said.touch()
    process = forks.start(script, "study=demo", *runs, *where, *machine, streams=[os.devnull, said, os.devnull])
    wait_for(lambda: len(list(place.runs.glob("killed/*/metrics.jsonl"))) >= 2, process)
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert started
    process.send_signal(number)
    status = process.wait(60)
    deadline = time.monotonic() + 30
    for run in map(int, started):
        with contextlib.suppress(OSError):
            while Path(f"/proc/{run}/cmdline").read_bytes():  # nothing: it has ended
                if time.monotonic() > deadline:
                    os.kill(run, signal.SIGKILL)
                    pytest.fail("a run outlived its study")
                time.sleep(0.05)
    assert len(list(place.runs.glob("killed/*/summary.json"))) == 1, "nor has it gone on to its end"
    return status, said.read_text()


needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")


@needs_proc
def test_no_run_outlives_a_study_that_is_killed(tmp_path: Path, forks: Forks) -> None:
    """That it goes on from there: tests/study/test_kills.py."""
    assert ended_in_its_second_run(forks, Workplace(tmp_path), signal.SIGKILL)[0] == -9


@needs_proc
def test_asked_to_stop_and_continued_it_finishes_without_repeating_finished_runs(tmp_path: Path, forks: Forks) -> None:
    status, said = ended_in_its_second_run(forks, Workplace(tmp_path), signal.SIGTERM)
    assert status == 143
    study = tmp_path / "runs" / "killed"
    done = {path: path.stat().st_mtime_ns for path in study.glob("*/summary.json")}
    assert len(done) == 1
    assert len(re.findall(r"^started \S+; its log: ", said, flags=re.M)) == 2
    *_, stopped, hint, pasted = said.splitlines()
    assert stopped == "runs: stopped with 1 of 3 runs done" and hint.endswith("; continue with")
    _, script, *words = shlex.split(pasted)
    assert Path(script).resolve() == Path(run_study.__file__)
    again = forks.run(tmp_path / "forked.py", *words)
    assert again.status == 0, again.output + again.errors
    assert re.search(r"^runs: 2 runs to do, 1 at a time; about \d+ s left$", again.output, flags=re.M)
    assert re.search(
        r"^\[1/2\] \S+: validation .* per token at \d+ tokens \(\d+ s\); about \d+ s left$", again.output, flags=re.M
    )
    assert re.search(r"^\[2/2\] \S+: validation .* per token at \d+ tokens \(\d+ s\)$", again.output, flags=re.M)
    line = again.output.splitlines()[-1]
    assert len(line) <= 1024 and Path(json.loads(line)["record"]) == study / "study.json"
    assert "1 of 3 runs are finished already" in again.output
    assert {path: path.stat().st_mtime_ns for path in done} == done
    results = load_results(study)
    assert {run.arm for run in results.runs} == {"mha", "mqa", "mla"}
    assert results.missing == 0
    (declared,) = results.record["history"]
    assert declared["results"] == 0 and [*declared["arms"].values()] == [[0, 1, 2]] * 4, "of the study's YAML"
    assert all(run.evaluation() is not None for run in results.runs)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("started\nerror: no such text: give one\n", "no such text: give one"),
        (
            'Traceback (most recent call last):\n  File "a.py", line 1\nKeyError: 1\n\nDuring handling:\n'
            'Traceback (most recent call last):\n  File "b.py", line 2\n    fail()\nRuntimeError: CUDA error: busy\n'
            "Search for it\n\nCompile with this option to learn more\n",
            "RuntimeError: CUDA error: busy",
        ),
        ("Traceback (most recent call last):\n  File", "  File"),
        ("step 3\nKilled\n\n", "Killed"),
        ("\n", "it said nothing"),
    ],
)
def test_of_a_failed_run_the_sentence_that_says_why_is_shown(tmp_path: Path, log: str, words: str) -> None:
    file = tmp_path / "run.log"
    file.write_text(log)
    assert last_words(file, 1) == f"{words} (status 1; {file})"
