"""Slurm without Slurm: the batch script between small stand-ins for srun and scontrol, the launcher on this machine."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.micro import Workplace, records, summary_of
from tests.support.processes import ROOT

SUBMITIT = importlib.util.find_spec("submitit") is not None


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job on two nodes; srun runs its command here, once, and scontrol keeps a record."""
    programs = {
        "srun": 'echo "$@" > "$RECORD/srun"\nexec "${SRUN_RUNS:-$@}"',
        "scontrol": 'if [ "$1" = show ]; then printf "localhost\\nsecond\\n"; else echo "$@" >> "$RECORD/scontrol"; fi',
    }
    record = tmp_path / "record"
    record.mkdir()
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORD": str(record),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "OMP_NUM_THREADS": "1",
    }


def test_the_batch_job_starts_a_process_per_gpu_that_meet_at_the_first_node(cluster: dict[str, str], tmp_path: Path) -> None:
    arguments = ["model=gpt2", "tracking.notes=two words"]
    done = subprocess.run(["bash", "scripts/slurm.sh", *arguments], cwd=ROOT, env={**cluster, "SRUN_RUNS": "true"})
    assert done.returncode == 0
    line = (tmp_path / "record" / "srun").read_text()
    for part in (
        "--nnodes=2 --nproc-per-node=4 --max-restarts=3",
        "--rdzv-backend=c10d --rdzv-id=12345",
        "--rdzv-endpoint=localhost:32345",
        "train_model.py model=gpt2 tracking.notes=two words\n",
    ):
        assert part in line
    assert not (tmp_path / "record" / "scontrol").exists()


def test_before_its_time_limit_the_job_goes_back_into_the_queue_and_trains_until_slurm_ends_it(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    trainer = tmp_path / "trainer"
    trainer.write_text('#!/usr/bin/env bash\ntouch "$RECORD/started"\nsleep 2\ntouch "$RECORD/trained"\nexit 7\n')
    trainer.chmod(0o755)
    with subprocess.Popen(["bash", "scripts/slurm.sh"], cwd=ROOT, env={**cluster, "SRUN_RUNS": str(trainer)}) as job:
        while not (tmp_path / "record" / "started").exists():
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=30) == 7
    assert (tmp_path / "record" / "scontrol").read_text() == "requeue 12345\n"
    assert (tmp_path / "record" / "trained").exists()


@pytest.mark.slow
def test_the_batch_job_trains(cluster: dict[str, str], tmp_path: Path) -> None:
    place = Workplace(tmp_path / "place")
    environ = {**cluster, "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    line = ["bash", "scripts/slurm.sh", *place.overrides("name=run", "budget.steps=2")]
    done = subprocess.run(line, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert records(done.stdout) == [summary_of(place.runs / "run")]
    assert summary_of(place.runs / "run")["processes"] == 2


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "train_model.py"), *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=folder, env=environ, capture_output=True, text=True)


@pytest.mark.skipif(SUBMITIT, reason="the launcher is installed")
def test_without_the_launcher_its_choice_is_refused_with_the_remedy(tmp_path: Path) -> None:
    done = command("-m", "hydra/launcher=slurm", "attention=mla", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: hydra/launcher=slurm needs hydra-submitit-launcher: pip install -r requirements-extra.txt\n")


@pytest.mark.skipif(not SUBMITIT, reason="needs hydra-submitit-launcher (requirements-extra.txt)")
def test_the_launcher_is_a_choice_that_goes_on_after_a_time_limit(tmp_path: Path) -> None:
    shown = command(
        "--cfg", "hydra", "-p", "hydra.launcher", "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=4", folder=tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    for line in ("SlurmLauncher", "gpus_per_node: 4", "max_num_timeout: 100", "timeout_min: 720"):
        assert line in shown.stdout


@pytest.mark.slow
@pytest.mark.skipif(not SUBMITIT, reason="needs hydra-submitit-launcher (requirements-extra.txt)")
def test_jobs_of_a_launcher_train_in_processes_of_their_own_and_a_failed_one_is_told(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "place")
    done = command(
        "-m",
        "hydra/launcher=submitit_local",
        "hydra.launcher.gpus_per_node=2",
        f"hydra.sweep.dir={tmp_path}/jobs",
        *place.overrides("budget.steps=1", "device=cpu,mps"),
        folder=tmp_path,
    )
    assert done.returncode == 1 and "the run failed: " in done.stderr and "device=mps" in done.stderr
    (summary,) = (summary_of(path.parent) for path in place.runs.glob("*/summary.json"))
    assert summary["processes"] == 2
