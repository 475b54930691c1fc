"""Records that are not what was written: every reader says so in a sentence that names the file, and counts nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eval_model
from harness.errors import UserError
from harness.files.metrics import read_metrics
from harness.report.findings import Findings, over_seeds
from harness.report.sections import sections
from harness.runs.records import DecodeTimes, StudyRecord, read_evaluations, read_study, read_summary, save
from harness.runs.session import Session
from harness.study.results import load_results
from scripts import compare_runs, export, report, run_study, show_runs, sync_wandb
from tests.report.test_comparison import evaluate, make_run
from tests.support.micro import Workplace
from tests.support.study_runs import ARMS, write_study

RUN = "mla-lr0.007-seed0"
FILES = {
    "study": "study.json",
    "summary": f"{RUN}/summary.json",
    "evaluation": f"{RUN}/evaluations/stdlib-test-00000000.json",
    "segments": f"{RUN}/segments/stdlib-test-00000000.json",
    "decode": "decode.json",
    "config": f"{RUN}/config.yaml",
    "metrics": f"{RUN}/metrics.jsonl",
}
GONE = object()

# The file, where in it, what stands there instead, and what is said of it.
WRONG: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("study", ("arms",), [], "arms=[] must be a group of fields"),
    ("study", ("arms",), {}, "it has no arms"),
    ("study", ("arms", "gqa"), None, "arms.gqa=null must be"),
    ("study", ("arms", "mla", "overrides"), "attention=mla", "arms.mla.overrides=attention=mla must be a list"),
    ("study", ("arms", "mla", "reference"), "no", "arms.mla.reference=no must be true or false"),
    ("study", ("arms", "mla", "match", 0, "mismatch"), "5 %", "mismatch=5 % must be a finite number"),
    ("study", ("arms", "mla", "family"), GONE, "arms.mla.family is missing"),
    ("study", ("metric",), "blue", "metric=blue is none of loss, perplexity"),
    ("study", ("metric",), ["loss"], "must be text"),
    ("study", ("contrasts",), [["mla"]], "contrasts[0]=['mla'] must be a list of 2"),
    ("study", ("contrasts",), [["mla", "mla"]], "compares mla with itself"),
    ("study", ("contrasts",), [["mla", "nobody"]], "contrasts names nobody, no arm of it"),
    ("study", ("staircase",), ["mha", "nobody"], "staircase names nobody"),
    ("study", ("runs",), {}, "runs={} must be a list"),
    ("study", ("runs", 0, "arm"), "nobody", "runs names nobody"),
    ("study", ("runs", 0, "name"), "../../secret", "which is no folder of this study"),
    ("study", ("runs", 0, "name"), "/etc", "which is no folder of this study"),
    ("study", ("runs", 0, "lr"), 0, "runs[0].lr=0 must be"),
    ("study", ("runs", 0, "lr"), float("nan"), "NaN is no number of JSON"),
    ("study", ("runs", 0, "seed"), -1, "runs[0].seed=-1 must be 0 or more"),
    ("study", ("runs", 0, "seed"), 1, "two of its runs are of arm mha and seed 1"),
    ("study", ("runs", 1, "name"), "mha-lr0.006-seed0", "runs names mha-lr0.006-seed0 twice"),
    ("study", ("runs", 2, "seed"), 7, "is a run of seed 0, in this study's record of seed 7"),
    ("study", ("chosen_lr", "mla"), "fast", "chosen_lr.mla=fast must be a finite number"),
    ("study", ("shared_lr",), -1, "shared_lr=-1 must be"),
    ("study", ("failures",), [{"run": "x"}], "failures[0].error is missing"),
    ("study", ("question",), GONE, "question is missing"),
    ("summary", ("loss",), "3.4", 'loss="3.4" must be a finite number'),
    ("summary", ("loss",), GONE, "lacks loss"),
    ("summary", ("loss",), -1, "loss=-1 must be 0 or more"),
    ("summary", ("bits_per_byte",), None, "bits_per_byte=null must be"),
    ("summary", ("perplexity",), 1e300, "perplexity=1e+300 must be 0 or more and below 1e100"),
    ("summary", ("tokens",), 10**30, "is beyond 64 bits"),
    ("summary", ("tokens",), True, "tokens=true must be a whole number"),
    ("summary", ("parameters",), 0, "parameters=0 must be 1 or more"),
    ("summary", ("parameters_by_block",), [1], "parameters_by_block=[1] must be a group"),
    ("summary", ("seed",), 4, "is a run of seed 4, in this study's record of seed 0"),
    ("summary", ("data_fingerprint",), None, "data_fingerprint=null must be text"),
    ("summary", ("device",), {"a": 1}, "must be text"),
    ("summary", (), [1, 2], "it holds no JSON object"),
    ("evaluation", ("evaluated_tokens",), "all", "evaluated_tokens=all must be a whole number"),
    ("evaluation", ("bits_per_byte",), GONE, "lacks bits_per_byte"),
    ("evaluation", ("split",), GONE, "lacks split"),
    ("evaluation", ("dataset",), ["stdlib"], "must be text"),
    ("evaluation", ("loss_by_position",), [[1, 2]], "must be a list of 3"),
    ("evaluation", ("loss_by_position",), {"1": 2.0}, "must be a list"),
    ("evaluation", ("extras",), [], "extras=[] must be a group"),
    ("evaluation", ("extras", "recall"), [], "extras.recall=[] must be a group"),
    ("evaluation", ("extras", "recall", "passkey", 0, "accuracy"), GONE, "passkey[0].accuracy is missing"),
    ("evaluation", ("extras", "repeats"), [1], "extras.repeats=[1] must be a group"),
    ("evaluation", ("extras", "repeats", "gain"), [1], "extras.repeats.gain=[1] must be a finite number"),
    ("evaluation", ("extras", "repeats", "share"), "0.5", 'extras.repeats.share="0.5" must be a finite number'),
    ("evaluation", ("extras", "telepathy"), "none", "extras.telepathy=none must be a group"),
    ("evaluation", ("through_cache",), True, "through_cache=true, and no cache_dtype"),
    ("segments", ("nats",), {}, "nats={} must be a list"),
    ("segments", ("nats", 3), "much", "nats[3]=much must be a finite number"),
    ("segments", ("bytes",), [1, 2], "150 losses and 2 sizes"),
    ("decode", ("rows",), GONE, "rows is missing"),
    ("decode", ("rows", 0, "milliseconds"), "2", "must be a finite number"),
    ("decode", ("rows", 0, "context"), 0, "context=0 must be 1 or more"),
    ("config", ("model", "max_seq_len"), "long", "model.max_seq_len=long must be a whole number"),
    ("config", ("model",), GONE, "model is missing"),
    ("metrics", (0, "tokens"), "many", "it has no tokens that is a count"),
    ("metrics", (1, "val/loss"), "low", "val/loss is no number"),
    ("metrics", (1,), 7, "it holds no JSON object"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = {arm: ARMS[arm] for arm in ("mha", "gqa", "mla")}
    return write_study(
        tmp_path_factory.mktemp("studies") / "sent", arms, seeds=(0, 1), contrasts=[["mla", "gqa"]], sweep=True, decode=True
    )


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    content = copy.deepcopy(content)
    here = content
    for key in place[:-1]:
        here = here[key]
    if value is GONE:
        del here[place[-1]]
    else:
        here[place[-1]] = value
    return content


def spoil(file: Path, place: tuple[Any, ...], value: Any) -> None:
    import yaml

    text = file.read_text()
    if file.suffix == ".jsonl":
        rows = changed([json.loads(line) for line in text.splitlines()], place, value)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(json.dumps(changed(yaml.safe_load(text), place, value)))


@pytest.mark.parametrize(("kind", "place", "value", "sentence"), WRONG)
def test_a_study_with_a_wrong_record_is_refused_by_its_files_name(
    study: Path, kind: str, place: tuple[Any, ...], value: Any, sentence: str
) -> None:
    file = study / FILES[kind]
    whole = file.read_bytes()
    try:
        spoil(file, place, value)
        with pytest.raises(UserError) as refused:
            sections(Findings(load_results(study)))
    finally:
        file.write_bytes(whole)
    assert sentence in str(refused.value)
    names = (str(file), str(study / RUN), str(study / "mha-lr0.006-seed0"))
    assert any(name in str(refused.value) for name in names)


def test_it_is_a_sentence_of_the_commands_that_read_it_too(study: Path, tmp_path: Path) -> None:
    whole = (study / "study.json").read_bytes()
    try:
        spoil(study / "study.json", ("arms", "mla", "match"), "none")
        with pytest.raises(UserError, match=r"study\.json is not as it was written \(arms\.mla\.match=none"):
            report.main(["name=sent", f"runs_dir={study.parent}"])
    finally:
        (study / "study.json").write_bytes(whole)
    arguments = ["study=demo", "dry_run=true", f"runs_dir={tmp_path}", "tracking=none"]
    (tmp_path / "demo").mkdir()
    for content, sentence in (('{"arms": {"mha": 5}}', "study.json"), ('{"arms"', "cannot be read as JSON")):
        (tmp_path / "demo" / "study.json").write_text(content)
        with pytest.raises(UserError, match=sentence):
            run_study.main(arguments)


def test_nesting_duplicates_and_a_torn_file_are_said(study: Path) -> None:
    file = study / "study.json"
    whole = file.read_text()
    for content, sentence in (
        (whole[: len(whole) // 2], "cannot be read as JSON"),
        (whole[:-1] + ', "deep": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested too deeply"),
        (whole[:-1] + ', "runs": []}', "a name stands twice"),
        ("", "cannot be read as JSON"),
    ):
        file.write_text(content)
        try:
            with pytest.raises(UserError, match=sentence):
                read_study(study)
        finally:
            file.write_text(whole)


def test_what_a_killed_process_left_of_a_line_is_no_line_and_a_loss_that_was_not_finite_no_point(study: Path) -> None:
    file = study / FILES["metrics"]
    whole = file.read_text()
    try:
        spoil(file, (3, "val/loss"), None)
        with file.open("a") as metrics:
            metrics.write('{"step": 99, "tok')
        rows = read_metrics(study / RUN)
        assert rows[3]["val/loss"] is None and len(rows) == len(whole.splitlines())
        assert len(over_seeds(Findings(load_results(study)).curves)["mla"]) == len(rows) - 1
    finally:
        file.write_text(whole)


def test_evaluations_come_in_the_order_of_their_own_times(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mha")
    for name, made in (("b", "2026-02-02"), ("c", None), ("a", "2026-02-03"), ("d", None)):
        evaluate(run, file=name, **({"finished_at": made} if made else {}))
    assert [record["record"] for record in read_evaluations(run)] == ["c", "d", "b", "a"]


# --- every command that reads a run's records ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("commands"))
    place.train("sent", "attention=mla")
    assert place.evaluate("run=sent", "extras=[]") == 0
    return place


COMMANDS: dict[str, Callable[[Workplace], list[str]]] = {
    "compare_runs": lambda place: [str(place.runs), "tracking=none", f"out={place.folder / 'out'}"],
    "eval_model": lambda place: ["run=sent", *place.places()],
    "export": lambda place: [f"run={place.runs / 'sent'}", f"to={place.folder / 'exported'}"],
    "show_runs": lambda place: [str(place.runs / "sent")],
    "sync_wandb": lambda place: [str(place.runs / "sent")],
}
MAINS = {
    "compare_runs": compare_runs,
    "eval_model": eval_model,
    "export": export,
    "show_runs": show_runs,
    "sync_wandb": sync_wandb,
}
OF_A_RUN: list[tuple[str, str, Any]] = [
    ("summary.json", "seed", "first"),
    ("summary.json", "cache_dtype", 5 * [1]),
    ("summary.json", "tokens", float("nan")),
    ("summary.json", "loss", {"value": 3.0}),
    ("evaluations/*.json", "perplexity", "low"),
    ("evaluations/*.json", "evaluated_tokens", -4),
    ("evaluations/*.json", "dataset", None),
    ("evaluations/*.json", "bits_per_byte", GONE),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "key", "value"), OF_A_RUN)
def test_every_command_refuses_a_run_whose_record_is_wrong(
    place: Workplace, command: str, name: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "eval_model" and name != "summary.json":
        pytest.skip("it reads no evaluation")
    if command == "show_runs":
        pytest.importorskip("trackio")
    (file,) = (place.runs / "sent").glob(name)
    whole = file.read_bytes()
    monkeypatch.setenv("WANDB_MODE", "offline")
    try:
        spoil(file, (key,), value)
        with pytest.raises(UserError, match=file.name):
            MAINS[command].main(COMMANDS[command](place))
    finally:
        file.write_bytes(whole)
    assert not (place.folder / "exported").exists()


def test_a_summary_of_an_older_version_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mha")
    (run / "summary.json").write_text('{"name": "old", "unknown": [1]}')
    assert read_summary(run) == {"name": "old", "unknown": [1]}
    with pytest.raises(UserError, match=r"summary\.json lacks loss, tokens: delete it and run the command"):
        read_summary(run, "name", "loss", "tokens")


def test_a_record_that_no_reader_would_take_is_our_mistake_and_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, made = Workplace(tmp_path), Session.summary
    run = place.runs / "run"
    with monkeypatch.context() as planted:
        planted.setattr(Session, "summary", lambda *given: made(*given) | {"steps": -1})
        with pytest.raises(AssertionError, match=r"^summary\.json would be no RunSummary: steps=-1 must be 0 or more"):
            place.train("run")
    assert not (run / "summary.json").exists()
    place.train("run")
    with monkeypatch.context() as planted:
        planted.setattr("harness.runs.evaluate_run.now", list)
        with pytest.raises(AssertionError, match=r"would be no Evaluation: finished_at=\[\] must be text"):
            place.evaluate("run=run", "extras=[]")
    assert read_evaluations(run) == []
    for kind, record in ((StudyRecord, {"arms": {}}), (DecodeTimes, {"rows": [{"arm": "mla"}]})):
        with pytest.raises(AssertionError, match=rf"^a\.json would be no {kind.__name__}: .* is missing$"):
            save(tmp_path / "a.json", kind, record)
    assert not (tmp_path / "a.json").exists()
