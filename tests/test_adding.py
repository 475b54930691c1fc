"""What is added in one place is known to every command, in a copy of the project."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forks import Forks
from tests.support.projects import copy_project

PROBE = """
from harness.evaluation.probes import Probe, Subject


def measure(subject: Subject) -> dict[str, float] | None:
    return {"share": float((subject.split.tokens == subject.end_of_text).mean())}


PROBE = Probe(measure, lambda figures: [("ends of text", f"{100 * figures['share']:.1f} % of the tokens")], "never")
"""
RECIPE = """

def _build_nadam(weights: Weights, config: OptimizerConfig, capturable: bool) -> list[torch.optim.Optimizer]:
    return [torch.optim.NAdam([*weights.vectors, *weights.matrices], lr=config.lr)]


OPTIMIZERS["nadam"] = Recipe(_check_adamw, _build_nadam)
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
METRIC = """
METRICS["patience"] = Metric("patience", "seconds of scoring", True, 3, ("seconds",))
"""
STUDY = """
question: Which arm takes longer to score?
metric: patience
base: [dataset=counted, tokenizer=bytes, model=tiny, model.n_layers=1, model.max_seq_len=32, batch_size=4, budget.steps=2]
seeds: [0]
arms:
  mha: {family: mha, overrides: [attention=mha]}
  mqa: {family: mqa, overrides: [attention=mqa]}
contrasts: [[mha, mqa]]
evaluate: [max_tokens=256, "extras=[]"]
"""
# train_model.py, asked to stop after its second step.
STOPPED = """
import os, signal, sys
import train_model
from harness.tracking import Tracker

log = Tracker.log
def stopping(self, step, *rest, **named):
    log(self, step, *rest, **named)
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
Tracker.log = stopping
sys.exit(train_model.main(sys.argv[1:]))
"""
PLACE = ("dataset=local", "dataset.path=text.txt", "tokenizer=bytes", "evaluation.max_tokens=512", "schedule=wsd")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with a probe, an optimizer, a source and a metric more, and a text."""
    project = copy_project(tmp_path_factory.mktemp("adding") / "project")
    (project / "text.txt").write_text("\n".join(f"line {i} of a small corpus" for i in range(400)), encoding="utf-8")
    (project / "harness/evaluation/probes/ends.py").write_text(PROBE)
    schema = project / "harness/config/schema.py"
    before = schema.read_text()
    schema.write_text(before.replace('"latents")', '"latents", "ends")'))
    assert schema.read_text() != before
    adamw = (project / "configs/optimizer/adamw.yaml").read_text()
    (project / "configs/optimizer/nadam.yaml").write_text(adamw.replace("name: adamw", "name: nadam"))
    (project / "harness/data/counting.py").write_text(SOURCE)
    for module, added in (
        ("harness/training/optimizer.py", RECIPE),
        ("harness/data/sources.py", ITS_LINE),
        ("harness/evaluation/metric.py", METRIC),
    ):
        (project / module).write_text((project / module).read_text() + added)
    (project / "configs/dataset/counted.yaml").write_text("name: counted\nsource: counting\n")
    (project / "configs/study/patience.yaml").write_text(STUDY)
    (project / "stopped.py").write_text(STOPPED)
    return project


@pytest.fixture(scope="module")
def forks(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"), project)
    yield forks
    forks.close()


def run(forks: Forks, script: str, *arguments: str, status: int = 0) -> str:
    """What it prints."""
    done = forks.run(script, *arguments, "tracking=none", "device=cpu")
    assert done.status == status, done.output + done.errors
    return done.output


def test_a_probe_that_is_one_file_and_one_name_is_measured_and_shown(project: Path, forks: Forks) -> None:
    run(forks, "train_model.py", "name=probed", "budget.steps=2", *PLACE)
    said = run(forks, "eval_model.py", "run=probed", "max_tokens=512")
    assert "ends of text" in said and "% of the tokens" in said
    (record,) = (project / "runs/probed/evaluations").glob("*.json")
    assert json.loads(record.read_text())["extras"]["ends"]["share"] >= 0


def test_an_optimizer_that_is_one_recipe_and_one_yaml_trains_and_is_resumed(project: Path, forks: Forks) -> None:
    few = ("name=run", "optimizer=nadam", "optimizer.lr=0.001", "budget.steps=4", "intervals.log=1", *PLACE)
    run(forks, "stopped.py", *few, status=143)
    assert [int(path.name.removeprefix("step-")) for path in (project / "runs/run/checkpoints").glob("step-*")] == [2]
    run(forks, "train_model.py", *few)
    assert json.loads((project / "runs/run/summary.json").read_text())["steps"] == 4


def test_a_source_that_is_one_function_and_one_line_and_a_metric_with_its_direction_make_a_study(
    project: Path, forks: Forks
) -> None:
    run(forks, "scripts/run_study.py", "study=patience")
    studied = next((project / "runs").glob("**/study.json")).parent
    rows = list(csv.DictReader((studied / "report.csv").open()))
    records = [json.loads(file.read_text()) for file in studied.glob("*/evaluations/*.json")]
    assert sorted(float(row["test_patience"]) for row in rows) == sorted(record["seconds"] for record in records)
    assert all(record["dataset"] == "counted" and record["evaluated_tokens"] == 256 for record in records)
    page = (studied / "report.html").read_text()
    assert "test seconds of scoring, higher is better" in page
