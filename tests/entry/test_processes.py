"""train_model.py in several processes (gloo on the CPU): the same run as one process, continued by any number of them."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from harness.training.parallel import open_workers
from tests.support.forks import Forks
from tests.support.micro import Workplace, json_lines, metrics_of, records, summary_of
from tests.support.processes import ROOT, torchrun, train_in, train_until

STEPS = 6
# Two layers that share weights, gradients of several micro-batches a step, a checkpoint at every second step.
RUN = [
    "attention=mla_shared_weights",
    "model.n_layers=2",
    "batch_size=8",
    "micro_batch_size=1",
    "intervals.log=1",
    "intervals.evaluate=2",
    "intervals.checkpoint=2",
]
DDP, FSDP = ["parallel=ddp"], ["parallel=fsdp", "model.activation_checkpointing=true"]
DROPOUT = ["model.dropout=0.2", "attention=mha"]


class Runs(Workplace):
    """Runs that one process, two and four trained, and what the processes said of their engines."""

    said: list[Any]

    def asked(self, name: str, *more: str, until: int | None = None) -> dict[str, Any]:
        return {"overrides": self.overrides(f"name={name}", *RUN, *more), "until": until}

    def alone(self, name: str, *more: str, until: int | None = None) -> None:
        with open_workers("cpu") as workers:
            train_until(workers=workers, **self.asked(name, *more, until=until))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Runs:
    """`one` by one process; `two_ddp`, ... by more; `swapped` and `grown` by one after the other."""
    place = Runs(tmp_path_factory.mktemp("processes"))
    place.alone("one")
    place.alone("grown", until=2)
    place.alone("bfloat16", "precision=bfloat16")
    place.said = train_in(
        2,
        place.folder,
        [
            {"engine": "ddp"},
            {"engine": "fsdp"},
            place.asked("two_ddp", *DDP),
            place.asked("two_fsdp", *FSDP),
            place.asked("dropout", *DROPOUT),
            place.asked("mixed", *FSDP, "parallel.mixed_precision=true", "precision=bfloat16"),
            place.asked("swapped", *DDP, until=2),
            place.asked("grown", *FSDP, until=4),
        ],
        forks,
    )
    train_in(
        4,
        place.folder,
        [
            place.asked("four_ddp", *DDP),
            place.asked("four_fsdp", *FSDP),
            place.asked("swapped", *FSDP, until=4),
            place.asked("grown", *DDP),
        ],
        forks,
    )
    place.alone("swapped")
    return place


SHARED = ("two_ddp", "two_fsdp", "four_ddp", "four_fsdp", "swapped", "grown")


def tensors(run: Path, file: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "checkpoints" / f"step-{STEPS:08}" / file)


@pytest.mark.parametrize("name", SHARED)
def test_the_loss_curve_is_that_of_one_process_however_many_train_and_continue(runs: Runs, name: str) -> None:
    one, other = metrics_of(runs.runs / "one"), metrics_of(runs.runs / name)
    assert [(line["step"], line["tokens"]) for line in other] == [(line["step"], line["tokens"]) for line in one]
    for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss", "val/bits_per_byte"):
        expected = [line[key] for line in one if key in line]
        assert len(expected) >= 4 and [line[key] for line in other if key in line] == pytest.approx(expected, abs=1e-5)


def test_weights_gathered_in_bfloat16_change_a_run_no_more_than_rounding(runs: Runs) -> None:
    plain, mixed = (metrics_of(runs.runs / name) for name in ("bfloat16", "mixed"))
    for key in ("train/loss", "val/loss"):
        expected = [line[key] for line in plain if key in line]
        assert [line[key] for line in mixed if key in line] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("name", SHARED)
def test_checkpoints_hold_whole_tensors_of_the_same_values(runs: Runs, name: str) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = tensors(runs.runs / "one", file), tensors(runs.runs / name, file)
        assert {key: (t.shape, t.dtype) for key, t in other.items()} == {key: (t.shape, t.dtype) for key, t in one.items()}
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["two_ddp", "two_fsdp", "four_ddp", "four_fsdp"])
def test_a_shared_evaluation_is_exact(runs: Runs, name: str) -> None:
    """Of the same weights: those at the start."""
    one, other = (metrics_of(runs.runs / run)[0] for run in ("one", name))
    assert other["val/loss"] == pytest.approx(one["val/loss"], rel=1e-12)
    assert summary_of(runs.runs / name)["evaluated_tokens"] == summary_of(runs.runs / "one")["evaluated_tokens"]


def test_only_the_first_process_writes(runs: Runs) -> None:
    names = [{path.name for path in (runs.runs / run).iterdir()} for run in ("one", "two_ddp", "four_fsdp")]
    assert names[0] == names[1] == names[2]
    assert [summary_of(runs.runs / run)["processes"] for run in ("one", "two_ddp", "four_fsdp")] == [1, 2, 4]


def test_gradients_travel_once_a_step(runs: Runs) -> None:
    assert runs.said[:2] == [{"first": False, "last": True}] * 2


# The process of rank RANK is killed without any chance to clean up, once, after the step LAST.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from harness.runs import session
import train_model

loop = session.train

def train(*arguments, **options):
    for step in loop(*arguments, **options):
        yield step
        if step.number == {last} and os.environ["RANK"] == "{rank}" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

session.train = train
sys.exit(train_model.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("rank", "option"), [(0, "--master-port={port}"), pytest.param(1, "--standalone", marks=pytest.mark.slow)]
)
def test_a_killed_process_restarts_all_and_the_run_ends_as_if_nothing_had_happened(runs: Runs, rank: int, option: str) -> None:
    """Bit for bit, dropout included: both ways in which torchrun lets its processes meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        option = option.format(port=free.getsockname()[1])
    script = runs.folder / f"killed{rank}.py"
    script.write_text(KILLED.format(root=str(ROOT), last=5, rank=rank))
    overrides = runs.asked(f"killed{rank}", *DROPOUT, "checkpoints.background=false")["overrides"]
    done = torchrun(2, script, *overrides, options=("--max-restarts=1", option))
    assert done.returncode == 0, done.stderr
    assert "from step 5" in done.stdout
    (summary,) = records(done.stdout)
    whole = summary_of(runs.runs / "dropout")
    assert (summary["loss"], summary["train_loss"]) == (whole["loss"], whole["train_loss"])
    for key, tensor in tensors(runs.runs / "dropout", "model.safetensors").items():
        assert torch.equal(tensor, tensors(runs.runs / f"killed{rank}", "model.safetensors")[key]), key


# The last process alone is asked to stop, in the middle of step 3 or of an evaluation; the bad number is its own, too.
TROUBLE = """
import math, os, signal, sys
sys.path.insert(0, {root!r})
import train_model
from harness.entry.cli import run_script
from modeling.gpt import GPT

calls = 0
original = GPT.{method}

def counted(self, *arguments):
    global calls
    calls += 1
    here = os.environ["RANK"] == "1" and calls == {call}
    if here and "{trouble}" == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    result = original(self, *arguments)
    return result * math.nan if here and "{trouble}" == "nan" else result

GPT.{method} = counted
run_script(train_model.main, description=None)
"""


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize(("method", "call", "step"), [("loss", 10, 3), ("token_losses", 3, 2)])
def test_one_process_that_is_asked_to_stop_stops_all_and_the_run_goes_on(
    runs: Runs, forks: Forks, engine: str, method: str, call: int, step: int
) -> None:
    """Four micro-batches a step, two batches an evaluation, at steps 0, 2 and so on."""
    name = f"stopped-{method}-{engine}"
    script = runs.folder / f"{name}.py"
    script.write_text(TROUBLE.format(root=str(ROOT), method=method, call=call, trouble="signal"))
    overrides = runs.asked(name, f"parallel={engine}")["overrides"]
    statuses, output, errors = forks.run(script, *overrides, processes=2)
    assert statuses == [143, 143]
    (said,) = json_lines(output)
    assert (said["status"], said["step"]) == ("interrupted", step), errors
    assert (runs.runs / name / "checkpoints" / f"step-{step:08}").is_dir()
    runs.alone(name)
    one, other = metrics_of(runs.runs / "one"), metrics_of(runs.runs / name)
    assert [line["step"] for line in other] == [line["step"] for line in one]
    for key in ("train/loss", "val/loss"):
        expected = [line[key] for line in one if key in line]
        assert [line[key] for line in other if key in line] == pytest.approx(expected, abs=1e-5)


def refused(forks: Forks, script: Path, *overrides: str) -> list[str]:
    """The mistakes that two processes said, of which the first left with status 2 and the other was ended or left too."""
    statuses, _, errors = forks.run(script, *overrides, processes=2)
    assert statuses[0] == 2 and statuses[1] in (2, -signal.SIGTERM), errors
    return [line for line in errors.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_bad_number_of_one_process_stops_all_is_said_once_and_leaves_the_step_before(
    runs: Runs, forks: Forks, engine: str
) -> None:
    script = runs.folder / f"nan-{engine}.py"
    script.write_text(TROUBLE.format(root=str(ROOT), method="loss", call=10, trouble="nan"))
    (said,) = refused(forks, script, *runs.asked(f"nan-{engine}", f"parallel={engine}")["overrides"])
    assert said.startswith("error: step 3: the loss is nan") and "The checkpoint of step 2 is kept." in said
    assert "documents" in said or "document " in said


# The last process, as if of another machine, is alone given another argument, or finds other data.
APART = """
import dataclasses, os, sys
sys.path.insert(0, {root!r})
import train_model
from harness.entry.cli import run_script

load = train_model.load_data
if os.environ["RANK"] == "1":
    os.environ["LOCAL_RANK"] = "0"
    sys.argv += {arguments!r}
    if {data!r}:
        train_model.load_data = lambda *given, **options: dataclasses.replace(load(*given, **options), fingerprint="other")
run_script(train_model.main, description=None)
"""


def apart(runs: Runs, name: str, *arguments: str, data: bool = False) -> tuple[Path, list[str]]:
    script = runs.folder / f"{name}.py"
    script.write_text(APART.format(root=str(ROOT), arguments=list(arguments), data=data))
    return script, runs.asked(name)["overrides"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("optimizer.lr=0.1", "optimizer.lr is 0.1 there and 0.005 here"),
        ("seed=5", "data_seed is 5 there and 0 here"),
        ("micro_batch_size=2", "micro_batch_size is 2 there and 1 here"),
        ("intervals.checkpoint=3", "intervals.checkpoint is 3 there and 2 here"),
    ],
)
def test_processes_that_were_started_apart_all_end_before_anything_is_written(
    runs: Runs, forks: Forks, argument: str, said: str
) -> None:
    before = {path.name for path in runs.runs.iterdir()}
    script, overrides = apart(runs, "apart", argument)
    (sentence,) = refused(forks, script, *overrides)
    assert sentence.startswith(f"error: process 1 was started with another configuration than process 0 ({said}")
    assert {path.name for path in runs.runs.iterdir()} == before


def test_processes_may_have_places_of_their_own(runs: Runs, forks: Forks) -> None:
    script, overrides = apart(runs, "places", f"data_dir={runs.folder / 'data of another machine'}", f"runs_dir={runs.folder}")
    statuses, _, errors = forks.run(script, *overrides, processes=2)
    assert statuses == [0, 0], errors
    one, other = metrics_of(runs.runs / "one"), metrics_of(runs.runs / "places")
    assert [line["step"] for line in other] == [line["step"] for line in one]


def test_each_machine_reads_its_own_copy_of_the_data_whole(runs: Runs, forks: Forks) -> None:
    script, overrides = apart(runs, "copies", f"data_dir={runs.folder / 'copies'}")
    shutil.copytree(runs.folder / "data", runs.folder / "copies")
    (tokens,) = (runs.folder / "copies").glob("*/train.bin")
    whole = tokens.read_bytes()
    tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    statuses, _, errors = forks.run(script, *overrides, processes=2)
    assert statuses == [0, 0], errors
    assert f"{tokens} has other content than meta.json says. Preparing it again." in errors
    assert tokens.read_bytes() == whole


def test_processes_that_find_other_data_all_end_before_anything_is_written(runs: Runs, forks: Forks) -> None:
    before = {path.name for path in runs.runs.iterdir()}
    script, overrides = apart(runs, "data", data=True)
    (sentence,) = refused(forks, script, *overrides)
    assert sentence.startswith("error: the data of dataset=local in ") and "not the same for all processes" in sentence
    assert {path.name for path in runs.runs.iterdir()} == before


def test_what_the_first_process_refuses_is_said_once_and_ends_all(runs: Runs, forks: Forks) -> None:
    before = {path.name for path in runs.runs.iterdir()}
    assert refused(forks, ROOT / "train_model.py", *runs.asked("refused", "dataset.path=/nowhere")["overrides"]) == [
        "error: dataset.path=/nowhere does not exist: name a file, a folder or a quoted glob of such files"
    ]
    assert {path.name for path in runs.runs.iterdir()} == before


def test_a_sweep_is_refused_under_torchrun(forks: Forks) -> None:
    done = forks.run("train_model.py", "-m", "attention=mha,mla", environment={"TORCHELASTIC_RUN_ID": "none"})
    said = "error: -m starts a process for each run and cannot stand under torchrun; start torchrun for each run\n"
    assert done == ([2], "", said)
