"""What is added in one place is known to every command, in a copy of the project."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.forks import Forks
from tests.support.projects import copy_project
from tests.support.wandb_server import WandbServer

PROBE = """
from harness.evaluation.probes import Probe, Subject


def measure(subject: Subject) -> dict[str, float] | None:
    return {"share_of_ends": float((subject.split.tokens == subject.end_of_text).mean())}


PROBE = Probe(
    measure,
    lambda figures: [("ends of text", f"{100 * figures['share_of_ends']:.1f} % of the tokens")],
    "never",
    "Where texts end",
    {"share_of_ends": "ends, of all tokens"},
)
"""
ITS_METRIC = """
METRICS["ends"] = Metric("ends of text", 4, True, "ends", ("extras", "ends", "share_of_ends"))
"""
# Its state of a matrix is a row, a column and a number.
RECIPE = """

def _build_adafactor(weights: Weights, config: OptimizerConfig, capturable: bool) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adafactor([*weights.vectors, *weights.matrices], lr=config.lr)]


OPTIMIZERS["adafactor"] = Recipe(_check_adamw, _build_adafactor)
"""
SOURCE = """
from collections.abc import Iterator

from harness.data.documents import Document, Source


def counting_source() -> Source:
    def documents() -> Iterator[Document]:
        for split, count in (("validation", 40), ("test", 40), ("train", 400)):
            for number in range(count):
                yield Document(split, [f"number {number} of {split}, counted aloud"])

    return Source({"source": "counting"}, documents)
"""
ITS_LINE = """
from harness.data.counting import counting_source

SOURCES["counting"] = Origin(lambda dataset, how: counting_source())
"""
# A score, on the scale of bits per byte turned round, and a size: where each is declared, and where it is worked out.
FIGURES = {
    "harness/evaluation/metric.py": {
        "class ModelRecord": """
    bits_saved: Annotated[float, Metric("bits saved per byte", 4, higher_is_better=True)]


class ModelRecord""",
        "    parameters_by_block: dict": """    embedded: Annotated[Count, Shown("embedded")]
    parameters_by_block: dict""",
    },
    "harness/evaluation/perplexity.py": {
        "    def scores(self)": """    @property
    def bits_saved(self) -> float:
        return 8 - self.bits_per_byte

    def scores(self)"""
    },
    "harness/evaluation/model_facts.py": {
        "            **self.cache.record(),": """            "embedded": self.parameters["embedding"],
            **self.cache.record(),"""
    },
}
STUDY = """
question: Does what learns save more bits?
metric: bits_saved
base: [dataset=counted, tokenizer=bytes, model=tiny, model.n_layers=1, model.max_seq_len=32, batch_size=4, budget.steps=8]
seeds: [0, 1]
arms:
  still: {family: mha, overrides: [attention=mha, optimizer.lr=1e-9]}
  learns: {family: mqa, overrides: [attention=mqa]}
contrasts: [[learns, still]]
evaluate: [max_tokens=256, "extras=[ends]"]
"""
# train_model.py, killed after its third step.
KILLED = """
import os, signal, sys
import train_model
from harness.tracking import Tracker

log = Tracker.log
def killing(self, step, *rest, **named):
    log(self, step, *rest, **named)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Tracker.log = killing
sys.exit(train_model.main(sys.argv[1:]))
"""
PLACE = ("dataset=local", "dataset.path=text.txt", "tokenizer=bytes", "evaluation.max_tokens=512", "schedule=wsd")
SMALL = (*PLACE, "model.n_layers=1", "model.max_seq_len=32", "batch_size=4")


def change(project: Path, module: str, replaced: Mapping[str, str]) -> None:
    text = (project / module).read_text()
    for before, after in replaced.items():
        assert text.count(before) == 1, f"{module}: {before}"
        text = text.replace(before, after)
    (project / module).write_text(text)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with two figures, a probe and its metric, an optimizer and a source more, and a text."""
    project = copy_project(tmp_path_factory.mktemp("adding") / "project")
    (project / "text.txt").write_text("\n".join(f"line {i} of a small corpus" for i in range(400)), encoding="utf-8")
    for module, replaced in FIGURES.items():
        change(project, module, replaced)
    (project / "harness/evaluation/probes/ends.py").write_text(PROBE)
    change(project, "harness/config/schema.py", {'"latents")': '"latents", "ends")'})
    adamw = (project / "configs/optimizer/adamw.yaml").read_text()
    (project / "configs/optimizer/adafactor.yaml").write_text(adamw.replace("name: adamw", "name: adafactor"))
    (project / "harness/data/counting.py").write_text(SOURCE)
    for module, added in (
        ("harness/training/optimizer.py", RECIPE),
        ("harness/data/sources.py", ITS_LINE),
        ("harness/evaluation/metric.py", ITS_METRIC),
    ):
        (project / module).write_text((project / module).read_text() + added)
    (project / "configs/dataset/counted.yaml").write_text("name: counted\nsource: counting\n")
    (project / "configs/study/saving.yaml").write_text(STUDY)
    (project / "killed.py").write_text(KILLED)
    return project


@pytest.fixture(scope="module")
def forks(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    imported = ("scripts.run_study", "scripts.study_run", "harness.report.write", "matplotlib.figure")
    forks = Forks(tmp_path_factory.mktemp("forks"), project, imported=imported)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def probed(project: Path, forks: Forks) -> Path:
    """A run."""
    run(forks, "train_model.py", "name=probed", "budget.steps=2", *SMALL)
    return project / "runs/probed"


@pytest.fixture(scope="module")
def studied(project: Path, forks: Forks) -> Path:
    """A study of two arms and two seeds."""
    run(forks, "tests/support/small_study.py", "configs", "study=saving")
    return next((project / "runs").glob("**/study.json")).parent


def run(forks: Forks, script: str, *arguments: str, status: int = 0, tracking: str = "none", **environment: str) -> str:
    """What it prints."""
    where = [] if script == "scripts/compare_runs.py" else ["device=cpu"]
    done = forks.run(script, *arguments, f"tracking={tracking}", *where, environment=environment)
    assert done.status == status, done.output + done.errors
    return done.output + done.errors


def last_line(said: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads([line for line in said.splitlines() if line.startswith("{")][-1])
    return found


def of_report(studied: Path) -> tuple[dict[str, Any], list[dict[str, str]], str]:
    """report.json, report.csv and report.html."""
    rows = list(csv.DictReader((studied / "report.csv").open()))
    return json.loads((studied / "report.json").read_text()), rows, (studied / "report.html").read_text()


@pytest.mark.usefixtures("own_home")
def test_a_figure_that_is_declared_once_goes_wherever_figures_go(project: Path, forks: Forks) -> None:
    with WandbServer() as server:
        sent: dict[str, Any] = {"tracking": "wandb", **server.environment}
        trained = last_line(run(forks, "train_model.py", "name=shown", "budget.steps=2", *SMALL, **sent))
        said = run(forks, "eval_model.py", "run=shown", "cache.dtype=int8", "extras=[]", **sent)
        dashboard = server.only_run()
    run(forks, "eval_model.py", "run=shown", "extras=[]")
    summary = json.loads((project / "runs/shown/summary.json").read_text())
    saved, embedded = 8 - summary["bits_per_byte"], summary["parameters_by_block"]["embedding"]
    for record in (summary, trained):
        assert (record["bits_saved"], record["embedded"]) == (saved, embedded)
    scored = last_line(said)
    assert scored["bits_saved"] == 8 - scored["bits_per_byte"] and f"bits saved per byte{scored['bits_saved']:.4f}" in said
    (through,) = (
        record
        for file in (project / "runs/shown/evaluations").glob("*.json")
        if (record := json.loads(file.read_text()))["through_cache"]
    )
    assert through["bits_saved_without_cache"] == 8 - through["bits_per_byte_without_cache"]
    rows = [json.loads(line) for line in (project / "runs/shown/metrics.jsonl").read_text().splitlines()]
    assert [row["val/bits_saved"] for row in rows if "val/bits_saved" in row][-1] == saved
    assert dashboard.config["embedded"] == embedded and dashboard.summary["bits_saved"] == saved
    assert [key for key in dashboard.summary if key.startswith("eval/") and key.endswith("/bits_saved")]

    said = run(forks, "scripts/compare_runs.py", "runs/shown", "out=out")
    names, line = ([part for part in line.split("  ") if part] for line in said.splitlines()[2:4])
    cells = dict(zip(map(str.strip, names), map(str.strip, line), strict=True))
    (row,) = csv.DictReader((project / "out/comparison.csv").open())
    assert cells["embedded"] == f"{embedded:,}" == f"{int(row['embedded']):,}"
    assert cells["bits saved per byte"] == f"{float(row['bits_saved']):.4f}" and row["bits_saved_deviation"] == ""
    ((setup,),) = (table["setups"] for table in json.loads((project / "out/comparison.json").read_text())["tables"])
    assert setup["bits_saved"] == 8 - setup["bits_per_byte"]


def test_a_declared_figure_judges_a_study_in_its_direction(project: Path, forks: Forks, studied: Path) -> None:
    content, rows, page = of_report(studied)
    assert (content["metric"], content["higher_is_better"]) == ("bits_saved", True)
    ((verdict,), (best,)) = content["verdicts"], content["best"]
    means = {arm: content["arms"][arm]["bits_saved"] for arm in ("learns", "still")}
    assert verdict["difference"] == pytest.approx(means["learns"] - means["still"]) and means["learns"] > means["still"]
    assert verdict["resolved"] and " bits saved per byte better than still (2 seeds" in verdict["sentence"]
    assert (best["arms"], best["worse"], content["front"]) == (["learns", "still"], ["still"], ["learns"])
    assert "test bits saved per byte, higher is better" in page and "Highest test bits saved per byte: learns" in page
    assert "lower is better" not in page.partition('id="rates"')[0]
    for row in rows:
        for split in ("test", "validation"):
            assert float(row[f"{split}_bits_saved"]) == 8 - float(row[f"{split}_bits_per_byte"])
        assert int(row["embedded"]) > 0
    said = run(forks, "scripts/compare_runs.py", str(studied), "out=compared", "evaluation=max_tokens=256")
    assert " bits saved per byte " in said
    table = {row["attention"]: row for row in csv.DictReader((project / "compared/comparison.csv").open())}
    assert {key: float(row["bits_saved"]) for key, row in table.items()} == pytest.approx(
        {"mqa": means["learns"], "mha": means["still"]}
    )
    assert all(float(row["bits_saved_deviation"]) > 0 for row in table.values())


def test_a_probe_that_is_one_file_and_one_name_is_measured_and_shown(
    project: Path, forks: Forks, probed: Path, studied: Path
) -> None:
    said = run(forks, "eval_model.py", "run=probed", "max_tokens=512")
    assert "ends of text" in said and "% of the tokens" in said
    (record,) = (json.loads(file.read_text()) for file in (probed / "evaluations").glob("*.json"))
    share = record["extras"]["ends"]["share_of_ends"]
    assert share >= 0
    said = run(forks, "eval_model.py", "run=probed", "cache.dtype=int8", "extras=[ends]", "max_tokens=512")
    (place,) = (number for number, line in enumerate(said.splitlines()) if line.startswith("ends of text"))
    assert said.splitlines()[place + 1].split() == ["without", "it", f"{100 * share:.1f}", "%", "of", "the", "tokens"]
    assert "extras=endz is unknown; did you mean ends?" in run(forks, "eval_model.py", "run=probed", "extras=[endz]", status=2)

    content, rows, page = of_report(studied)
    ends = {float(row["test_ends"]) for row in rows} | {content["arms"][arm]["ends"] for arm in ("learns", "still")}
    assert len(ends) == 1 and all(words in page for words in ("Where texts end", "ends, of all tokens"))
    said = run(forks, "scripts/compare_runs.py", str(studied), "out=compared", "evaluation=max_tokens=256")
    assert "bits per byte" in said and "ends of text" not in said  # how much a probe has measured is no condition of a table


def test_an_optimizer_that_is_one_recipe_and_one_yaml_trains_is_killed_and_is_resumed(project: Path, forks: Forks) -> None:
    few = ("optimizer=adafactor", "optimizer.lr=0.01", "budget.steps=5", "intervals.log=1", "intervals.checkpoint=2", *SMALL)
    few = (*few, "checkpoints.background=false")
    run(forks, "killed.py", "name=run", *few, status=-9)
    assert [path.name for path in (project / "runs/run/checkpoints").glob("step-*")] == ["step-00000002"]
    assert "from step 3" in run(forks, "train_model.py", "name=run", *few)
    run(forks, "train_model.py", "name=whole", *few)
    ended = [json.loads((project / f"runs/{name}/summary.json").read_text()) for name in ("run", "whole")]
    assert ended[0]["steps"] == 5 and ended[0]["loss"] == ended[1]["loss"] < math.log(257)
    assert last_line(run(forks, "eval_model.py", "run=run", "extras=[]"))["loss"] > 0
    said = run(forks, "train_model.py", "optimizer=adafactr", *SMALL, status=2)
    assert "did you mean adafactor?" in said
    said = run(forks, "train_model.py", "optimizer.name=adafactr", *SMALL, status=2)
    assert "optimizer.name=adafactr is unknown" in said and "adafactor" in said
    refused = run(forks, "train_model.py", "name=run", *few, "optimizer=adamw", status=2)
    assert "(optimizer.name is adafactor there and adamw here)" in refused


def test_a_source_that_is_one_function_and_one_line_is_studied(studied: Path) -> None:
    records = [json.loads(file.read_text()) for file in studied.glob("*/evaluations/*.json")]
    assert len(records) == 4
    assert all(record["dataset"] == "counted" and record["evaluated_tokens"] == 256 for record in records)
