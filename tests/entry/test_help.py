"""--help of every command: status 0, every option with its default, nothing run; and what else begins with a sign."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from harness.config.compose import default_options, options_of
from harness.config.places import ROOT
from harness.config.schema import EvalConfig, TrainConfig
from harness.entry.cli import hydra_flags
from scripts import (
    benchmark_decode,
    compare_runs,
    convert,
    downstream_eval,
    export,
    generate,
    import_hf,
    kv_calculator,
    report,
    run_study,
    show_runs,
    sync_wandb,
)
from tests.support.forks import Ended, Forks

# Every script, and the definition of its options; None: it has none of its own.
OPTIONS: dict[str, type | None] = {
    "scripts/benchmark_decode.py": benchmark_decode.DecodeOptions,
    "scripts/check_attention.py": None,
    "scripts/check_code.py": None,
    "scripts/compare_runs.py": compare_runs.CompareOptions,
    "scripts/convert.py": convert.ConvertOptions,
    "scripts/downstream_eval.py": downstream_eval.DownstreamOptions,
    "scripts/export.py": export.ExportOptions,
    "scripts/generate.py": generate.GenerateOptions,
    "scripts/import_hf.py": import_hf.ImportOptions,
    "scripts/kv_calculator.py": kv_calculator.CalculatorOptions,
    "scripts/prepare_data.py": None,
    "scripts/report.py": report.ReportOptions,
    "scripts/run_study.py": run_study.StudyOptions,
    "scripts/run_tests.py": None,
    "scripts/show_runs.py": show_runs.ShowOptions,
    "scripts/study_run.py": None,
    "scripts/sync_wandb.py": sync_wandb.SyncOptions,
}


class Command(Protocol):
    def __call__(self, script: str, *arguments: str) -> Ended: ...


@pytest.fixture
def command(forks: Forks, tmp_path: Path) -> Iterator[Command]:
    """A command of the project's in a folder of its own, which it has left empty."""
    yield lambda script, *arguments: forks.run(script, *arguments, folder=tmp_path, environment={"COLUMNS": "110"})
    assert list(tmp_path.iterdir()) == []


def names(kind: Any, prefix: str = "") -> set[str]:
    """The dotted names of a dataclass's fields that hold a value."""
    found: set[str] = set()
    for field in dataclasses.fields(kind):
        inner = getattr(kind(), field.name)
        found |= names(type(inner), f"{prefix}{field.name}.") if dataclasses.is_dataclass(inner) else {prefix + field.name}
    return found


def named(text: str) -> set[str]:
    return set(re.findall(r"^([\w.]+)=", text, re.MULTILINE))


def test_every_script_is_among_these() -> None:
    scripts = {str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/*.py") if path.name != "__init__.py"}
    assert scripts == set(OPTIONS)
    for name, kind in OPTIONS.items():
        defined = [
            value
            for value in vars(importlib.import_module(name.removesuffix(".py").replace("/", "."))).values()
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__name__.endswith("Options")
        ]
        assert (kind is None) == (defined == []) and (kind is None or kind in defined), name


@pytest.mark.parametrize("name", OPTIONS)
def test_help_names_every_option_and_runs_nothing(name: str, command: Command) -> None:
    shown = command(name, "--help")
    assert (shown.status, shown.errors) == (0, "")
    assert f"python {name}" in shown.output
    kind = OPTIONS[name]
    assert kind is None or names(kind) <= named(shown.output)
    studies = options_of("study") if name in ("scripts/run_study.py", "scripts/report.py") else []
    assert all(re.search(rf"\b{study}\b", shown.output) for study in studies)


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("benchmarks/*.py")))
def test_help_of_a_benchmark_is_its_docstring_and_runs_nothing(name: str, command: Command) -> None:
    shown = command(f"benchmarks/{name}", "--help")
    assert (shown.status, shown.errors) == (0, "")
    assert "python benchmarks/" in shown.output


def test_what_the_benchmarks_share_is_refused_as_a_command(command: Command) -> None:
    refused = command("benchmarks/measuring.py")
    assert (refused.status, refused.output) == (2, "")
    assert refused.errors.startswith("error: benchmarks/measuring.py measures nothing")


@pytest.mark.parametrize(("name", "kind"), [("train", TrainConfig), ("eval", EvalConfig)])
def test_help_of_the_entrances_names_every_field_and_their_own_groups(name: str, kind: Any, command: Command) -> None:
    shown = command(f"{name}_model.py", "--help")
    assert (shown.status, shown.errors) == (0, "") and f"python {name}_model.py" in shown.output
    choices, _, fields = shown.output.partition("Fields (key=value)")
    assert named(choices) == set(default_options(name))
    assert all(option in choices for group in default_options(name) for option in options_of(group))
    found = named(fields)
    for field in dataclasses.fields(kind):
        assert field.name in found or any(path.startswith(f"{field.name}.") for path in found), field.name
    assert {"attention.backend", "cache.dtype", "tracking.tags"} <= found


def test_help_shows_the_fields_of_what_was_chosen_beside_it(command: Command) -> None:
    shown = command("train_model.py", "--help", "attention=mla", "model=gpt2").output
    assert re.search(r"^attention.kv_lora_rank=256$", shown, re.MULTILINE)
    assert re.search(r"^seed=0 +initial values and dropout$", shown, re.MULTILINE)  # the comment of its YAML
    assert re.search(r"^model.mlp=\w+ +swiglu \| relu2$", shown, re.MULTILINE)  # the choices of the schema
    refused = command("train_model.py", "attention=mlaa", "--help")
    assert refused.status == 2 and refused.errors == "error: attention=mlaa does not exist; did you mean mla?\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train_model.py", "--seed=1"], "--seed=1: options are written without dashes; write seed=1"),
        (["train_model.py", "--seed", "1"], "--seed: options are written without dashes; write seed=1"),
        (["train_model.py", "-m", "--seed=1,2"], "--seed=1,2: options are written without dashes; write seed=1,2"),
        (["eval_model.py", "--run=x"], "--run=x: options are written without dashes; write run=x"),
        (["eval_model.py", "--run"], "--run does nothing here; see python eval_model.py --help"),
        (
            ["scripts/generate.py", "--max-new-tokens=3"],
            "--max-new-tokens=3: options are written without dashes; write max_new_tokens=3",
        ),
        (["scripts/generate.py", "+seed=1"], "+seed=1: options are neither added nor deleted; write seed=1"),
        (["scripts/compare_runs.py", "--split=test"], "--split=test: options are written without dashes; write split=test"),
        (["scripts/check_attention.py", "--model=tiny"], "--model=tiny: options are written without dashes; write model=tiny"),
        (["scripts/prepare_data.py", "--verify"], "--verify: options are written without dashes; write verify=value"),
        (["scripts/run_study.py", "--seeds=1"], "--seeds=1: options are written without dashes; write seeds=1"),
        (["scripts/check_code.py", "--fast"], "--fast: nothing can be chosen here; leave it out"),
    ],
)
def test_an_option_with_dashes_or_a_sign_gets_the_one_without(arguments: list[str], sentence: str, command: Command) -> None:
    assert command(*arguments) == ([2], "", f"error: {sentence}\n")


def test_hydras_flags_are_found_where_hydra_keeps_them() -> None:
    flags = hydra_flags()  # of a private function of Hydra's, which another version may move
    assert {flag for flag, takes_value in flags.items() if takes_value} >= {"-c", "--cfg", "-i", "--info", "-p", "--package"}
    assert not any(flags[flag] for flag in ("-m", "--multirun", "-sc", "--shell-completion", "-r", "--run", "--hydra-help"))
