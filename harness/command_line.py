"""Command lines: `key=value` arguments into typed values, several runs after one another, errors in one sentence.

Values are taken as they stand for text fields (commas, spaces, '=' and brackets need no quoting) and read as YAML for
the others. Arguments without '=' go to the field named by `positional`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from harness.config import (
    CONFIGS,
    ROOT,
    check_config,
    did_you_mean,
    forced,
    implied,
    quoted,
    register_resolvers,
    sweep_jobs,
    typed,
)
from harness.errors import UserError

Options = TypeVar("Options")


def parse_options(kind: type[Options], arguments: Sequence[str], *, positional: str | None = None) -> Options:
    """The dataclass filled from key=value arguments; dotted keys reach nested dataclasses. Raises UserError.

    What has no `=`, or one behind no option and nothing like one (the default names of runs hold some), is positional.
    """
    import yaml

    leaves = _leaf_types(kind)
    container: dict[str, typing.Any] = {}
    rest: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if (
            key not in leaves
            and positional is not None
            and (not equals or "/" in key or not difflib.get_close_matches(key, list(leaves), n=1, cutoff=0.6))
        ):
            rest.append(argument)
            continue
        if not equals:
            raise UserError(f"{argument} is not of the form key=value; {did_you_mean(argument, list(leaves))}")
        if key not in leaves:
            raise UserError(f"{key} is not an option here; {did_you_mean(key, list(leaves))}")
        is_text = leaves[key] is str or (leaves[key] == str | None and value != "null")
        try:
            parsed = value if is_text else yaml.safe_load(value)
        # No such date, a tag, 1,000 brackets.
        except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{key}={value} cannot be read; give a number, true, false or null") from None
        if isinstance(parsed, str) and leaves[key] in (float, float | None):
            try:  # YAML 1.1 reads 1e-3 as text
                parsed = float(parsed)
            except ValueError:
                raise UserError(f"{key}={value} must be a number") from None
        here = container
        *groups, last = key.split(".")
        for group in groups:
            here = here.setdefault(group, {})
        here[last] = parsed
    if rest:
        container[typing.cast(str, positional)] = rest
    return typing.cast(Options, typed(kind, container, ""))


def _leaf_types(kind: typing.Any, prefix: str = "") -> dict[str, typing.Any]:
    leaves: dict[str, typing.Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        leaves.update(
            _leaf_types(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {f"{prefix}{name}": hint}
        )
    return leaves


def run_script(main: Callable[[list[str]], int], *, description: str | None) -> typing.NoReturn:
    """Call main(arguments) and leave with its status. A UserError is printed in one sentence, status 2; --help explains."""
    arguments = sys.argv[1:]
    try:
        if any(argument in ("-h", "--help") for argument in arguments):
            print((description or "").strip(), flush=True)
            status = 0
        else:
            status = main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of a pipe has had enough
        sys.stderr.close()
        status = 0
    sys.exit(status)


def run_hydra(
    script: str, config_name: str, main: Callable[[list[str]], int], *, description: str | None
) -> typing.NoReturn:
    """As `run_script`, for a command configured by configs/<config_name>.yaml.

    Hydra itself answers --help, --cfg, --info and shell completion. With -m it expands the lists of choices; all jobs
    are checked before the first starts. Every job is a process of its own, so that nothing leaks from one run into the
    next, and a failed one does not stop the rest. SIGTERM and SIGINT are passed on to the job, and no other starts.
    """
    flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    if not flags:
        run_script(main, description=description)

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    register_resolvers()
    failed: list[str] = []

    @hydra.main(config_path=str(CONFIGS), config_name=config_name, version_base="1.3")
    def job(_: DictConfig) -> None:
        overrides = [override.removeprefix("++") for override in HydraConfig.get().overrides.task]
        if HydraConfig.get().mode != hydra.types.RunMode.MULTIRUN:
            raise UserError(f"{' '.join(flags)} is not understood; run {script} --help")
        print(f"\n$ {script} {' '.join(overrides)}", flush=True)
        processes = HydraConfig.get().launcher.get("gpus_per_node") or 1  # of a launcher that asks a cluster for GPUs
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost",
                    f"--nproc-per-node={processes}"]  # fmt: skip
        line = [sys.executable, *(torchrun if processes > 1 else []), script, *overrides]
        status, stopped_by = _run_child(line)
        if stopped_by is not None:
            sys.exit(128 + stopped_by)
        if status:
            failed.append(f"{' '.join(overrides)} (status {status})")
            if HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":  # this is another process then
                raise UserError(f"the run failed: {failed[-1]}")

    try:
        taken = ("-c", "--cfg", "-i", "--info", "-p", "--package")  # by the flag before it
        words = [
            word for before, word in itertools.pairwise(sys.argv) if not word.startswith("-") and before not in taken
        ]
        overrides = [word for word in words if "=" in word or "-m" in flags or "--multirun" in flags]
        asking = {"-c", "--cfg", "-i", "--info", "--shell-completion", "-sc", "-r", "--run"}.intersection(flags)
        launcher = next((word for word in words if word.startswith("hydra/launcher=")), None)
        _prepare_launcher(launcher, overwrites="overwrite=true" in words)
        if os.environ.get("TORCHELASTIC_RUN_ID") and not {"-m", "--multirun"}.isdisjoint(flags):
            raise UserError(
                "-m starts a process for each run and cannot stand under torchrun; start torchrun for each run"
            )
        if asking and not {"-m", "--multirun"}.isdisjoint(flags):
            raise UserError(f"-m and {min(asking)} cannot stand together; leave one out")
        if not {"-m", "--multirun", "-c", "--cfg"}.isdisjoint(flags):
            ours = [override for override in overrides if not override.startswith("hydra")]
            for choices in sweep_jobs(ours):
                check_config(config_name, choices)
            if asking:
                # Beside the last of them: argparse takes the words before a flag and those behind it, not both.
                place = sys.argv.index(ours[-1]) + 1 if ours else len(sys.argv)
                sys.argv[place:place] = implied(config_name, ours)
        sys.argv[1:] = [
            forced(config_name, quoted(argument)) if argument in overrides else argument for argument in sys.argv[1:]
        ]
        job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe has had enough
        sys.stderr.close()
        sys.exit(0)
    if failed:
        print(f"error: {len(failed)} of the runs failed: {'; '.join(failed)}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _run_child(command: Sequence[str]) -> tuple[int, int | None]:
    """The command's status, and the signal, if one came, that was passed on to it and waited for.

    It has a process group of its own, so that a Ctrl-C reaches it once, from here.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        child = subprocess.Popen(command, process_group=0)
        for number in received:  # before there was a child
            child.send_signal(number)
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status, received[0] if received else None


def _prepare_launcher(chosen: str | None, overwrites: bool) -> None:
    """Jobs that a launcher starts elsewhere find the project from any folder. Raises UserError for what it cannot do."""
    if chosen is None:
        return
    if chosen.endswith(("=slurm", "=submitit_slurm", "=submitit_local")) and not importlib.util.find_spec("submitit"):
        raise UserError(f"{chosen} needs hydra-submitit-launcher: pip install -r requirements-extra.txt")
    if overwrites:
        raise UserError(
            f"overwrite=true and {chosen} do not go together: a job that goes back into the queue would delete its own "
            f"run; choose another name=..., or delete the runs yourself"
        )
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def newest_run(runs_dir: Path) -> Path:
    """The run that finished last. Raises UserError when none has."""
    done = finished_runs(runs_dir)
    if not done:
        raise UserError(f"no finished run in {runs_dir}; train one with: python train_model.py attention=mla")
    return done[-1]


def finished_runs(runs_dir: Path) -> list[Path]:
    """Runs with a summary.json, the one that finished last at the end."""
    summaries = [path for path in runs_dir.glob("*/summary.json") if not path.parent.name.startswith(".")]
    return [path.parent for path in sorted(summaries, key=lambda path: path.stat().st_mtime)]
