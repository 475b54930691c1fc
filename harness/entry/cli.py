"""Command lines: `key=value` arguments into typed values, several runs after one another, errors in one sentence.

Values are taken as they stand for text fields (commas, spaces, '=' and brackets need no quoting) and read as YAML for
the others. Arguments without '=' go to the field named by `positional`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from harness.config.compose import check_config, forced, implied, quoted, refuse_dashes, register_resolvers, sweep_jobs
from harness.config.places import CONFIGS, ROOT, user_path
from harness.config.run_config import find_run, run_folders
from harness.config.schema import TrainConfig
from harness.config.typed import did_you_mean, fields_below, typed
from harness.entry.streams import protect_streams
from harness.errors import UserError, readable, sentence
from harness.files.untrusted import Unreadable, read_object

Options = TypeVar("Options")
HELP = frozenset(("-h", "--help"))
# What the system says of a file or its disk, and no mistake of ours: permissions, a name too long, links in a circle.
_REFUSED = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP))


def parse_options(kind: type[Options], arguments: Sequence[str], *, positional: str | None = None) -> Options:
    """The dataclass filled from key=value arguments; dotted keys reach nested dataclasses. Raises UserError.

    What has no `=`, or one behind no option and nothing like one (the default names of runs hold some), is positional.
    """
    leaves = {path: hint for path, hint in fields_below(kind) if not dataclasses.is_dataclass(hint)}
    container: dict[str, typing.Any] = {}
    rest: list[str] = []
    refuse_dashes(arguments, known=leaves)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key[:1] in "+~" and key.lstrip("+~") in leaves:
            known = key.lstrip("+~")
            raise UserError(f"{argument}: options are neither added nor deleted; write {known}={value or 'value'}")
        if (
            key not in leaves
            and positional is not None
            and (not equals or "/" in key or not difflib.get_close_matches(key, list(leaves), n=1, cutoff=0.6))
        ):
            rest.append(argument)
            continue
        if not equals:
            remedy = f"write {argument}=..." if argument in leaves else did_you_mean(argument, list(leaves))
            raise UserError(f"{argument} is not of the form key=value; {remedy}")
        if key not in leaves:
            inside = [path for path in leaves if path.startswith(f"{key}.")]
            remedy = _of_group(value, inside, kind) if inside else did_you_mean(key, list(leaves))
            raise UserError(f"{key} is not an option here; {remedy}")
        here = container
        *groups, last = key.split(".")
        for group in groups:
            here = here.setdefault(group, {})
        here[last] = _parsed(key, value, leaves[key])
    if rest:
        container[typing.cast(str, positional)] = rest
    return typing.cast(Options, typed(kind, container, ""))


def options_and_overrides(kind: type[Options], arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """A script's own options, and the other words, which are train_model.py's. Raises UserError for one nearly its own."""
    own = [field.name for field in dataclasses.fields(typing.cast(typing.Any, kind))]
    of_runs = {field.name for field in dataclasses.fields(TrainConfig)}
    refuse_dashes(arguments, known={*own, *of_runs})
    overrides = [argument for argument in arguments if argument.partition("=")[0] not in own]
    for key in (override.partition("=")[0] for override in overrides):
        if key not in of_runs and difflib.get_close_matches(key, own, n=1, cutoff=0.8):
            raise UserError(f"{key} is not an option here; {did_you_mean(key, own)}")
    return parse_options(kind, [argument for argument in arguments if argument not in overrides]), overrides


def _of_group(value: str, inside: Sequence[str], kind: type) -> str:
    """The remedy for a value given to a group of options: the one of them that takes it, where that is one alone."""
    taking = []
    for path in inside:
        with contextlib.suppress(UserError):
            parse_options(kind, [f"{path}={value}"])
            taking.append(path)
    return f"did you mean {taking[0]}={value}?" if len(taking) == 1 else f"it is a group of {', '.join(inside)}"


def _parsed(key: str, value: str, kind: typing.Any) -> typing.Any:
    """A value as it stands where its option is text, else as YAML has it. Raises UserError for what is none."""
    import yaml

    if _is_text(kind) and (value != "null" or type(None) not in typing.get_args(kind)):
        return value
    try:
        parsed = yaml.safe_load(value)
    # No such date, a tag, 1,000 brackets.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{key}={value} cannot be read; give a number, true, false or null") from None
    if isinstance(parsed, str) and kind in (float, float | None):
        try:  # YAML 1.1 reads 1e-3 as text
            return float(parsed)
        except ValueError:
            raise UserError(f"{key}={value} must be a number") from None
    return parsed


def whole_numbers(key: str, text: str, *, least: int = 1) -> list[int]:
    """The different whole numbers of a list with commas, as they stand. Raises UserError for anything else."""
    if not re.fullmatch(r"-?[0-9]{1,18}(,-?[0-9]{1,18})*", text):
        raise UserError(f"{key}={text} must be whole numbers of at most 18 digits, separated by commas, as in {key}=1,2")
    numbers = [int(number) for number in text.split(",")]
    if len(set(numbers)) != len(numbers) or min(numbers) < least:
        raise UserError(f"{key}={text} must be different whole numbers from {least} on")
    return numbers


def _is_text(kind: typing.Any) -> bool:
    """Whether values are words: any, or one of some; perhaps none."""
    options = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    return any(option is str or typing.get_origin(option) is typing.Literal for option in options)


def run_script(
    main: Callable[[list[str]], int],
    *,
    description: str | None,
    options: type | None = None,
    groups: Sequence[str] = (),
    only_prints: bool = False,
    verbatim: bool = False,
) -> typing.NoReturn:
    """Call main(arguments) and leave with its status. A UserError is printed in one sentence, status 2.

    --help prints the description, the YAMLs of `groups` and the fields of `options`, and calls nothing. A line that cannot
    be printed changes nothing, but for a script that only_prints: it ends with the reader of its output. verbatim: what it
    prints is a text of its own, which files and pipes get as it is.
    """
    protect_streams(ends_with_reader=only_prints, verbatim=verbatim)
    arguments = sys.argv[1:]
    if HELP.isdisjoint(arguments):
        _leave(lambda: main(arguments))
    from harness.entry.help import script_help

    _leave(lambda: _tell(script_help(description, options, groups)))


def _leave(call: Callable[[], int]) -> typing.NoReturn:
    try:
        with refusals_said():
            status = call()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # of a script that only prints: the reader has had enough
        status = 0
    sys.exit(status)


@contextlib.contextmanager
def refusals_said() -> Iterator[None]:
    """A UserError inside is printed in one sentence, and so is what the system refuses of a file; the status is 2."""
    try:
        yield
        return
    except UserError as error:
        said = str(error)
    except OSError as error:
        if error.filename is None or error.errno not in _REFUSED:
            raise
        said = sentence(f"{error.filename} cannot be read or written ({error.strerror}): change that, or name another place")
    print(f"error: {said}", file=sys.stderr)
    sys.exit(2)


def _tell(text: str) -> int:
    print(text, flush=True)
    return 0


def run_hydra(script: str, config_name: str, main: Callable[[list[str]], int], *, description: str | None) -> typing.NoReturn:
    """As `run_script`, for a command configured by configs/<config_name>.yaml.

    Hydra itself answers --cfg, --info and shell completion. With -m it expands the lists of choices; all jobs
    are checked before the first starts. Every job is a process of its own, so that nothing leaks from one run into the
    next, and a failed one does not stop the rest. SIGTERM, SIGINT and SIGHUP are passed on to the job,
    and no other starts.
    """
    protect_streams()
    given = sys.argv[1:]
    flags = [argument for argument in given if argument.startswith("-")]
    if not flags:
        run_script(main, description=description)
    if not HELP.isdisjoint(flags):
        from harness.entry.help import config_help

        words = [argument for argument in sys.argv[1:] if argument not in flags]
        _leave(lambda: _tell(config_help(description, config_name, words)))

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    register_resolvers()
    failed: list[str] = []

    @hydra.main(config_path=str(CONFIGS), config_name=config_name, version_base="1.3")
    def job(_: DictConfig) -> None:
        overrides = [override.removeprefix("++") for override in HydraConfig.get().overrides.task]
        print(f"\n$ {script} {' '.join(overrides)}", flush=True)
        processes = HydraConfig.get().launcher.get("gpus_per_node") or 1  # of a launcher that asks a cluster for GPUs
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", f"--nproc-per-node={processes}"]
        line = [sys.executable, *(torchrun if processes > 1 else []), script, *overrides]
        status, stopped_by = run_child(line)
        if stopped_by is not None:
            again = [argument for argument in given if not argument.startswith("overwrite=")]
            print(f"the sweep is interrupted; continue it with\n  {pasteable(script, again)}", flush=True)
            sys.exit(128 + stopped_by)
        if status:
            failed.append(f"{' '.join(overrides)} (status {status})")
            if HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":  # this is another process then
                raise UserError(f"the run failed: {failed[-1]}")

    with refusals_said():
        refuse_dashes(given, hydra_flags())
        sys.argv[1:] = _for_hydra(script, config_name, given, flags)
        job()
    if failed:
        print(f"error: {len(failed)} of the runs failed: {'; '.join(failed)}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def hydra_flags() -> dict[str, bool]:
    """Every flag of Hydra's command line, True for those with a value."""
    from hydra._internal.utils import get_args_parser  # private: Hydra has no public list, and one copied here would age

    return {flag: action.nargs != 0 for flag, action in get_args_parser()._option_string_actions.items()}


# Those that something here depends on.
_MANY, _CONFIG, _INFO = {"-m", "--multirun"}, {"-c", "--cfg"}, {"-i", "--info"}
_COMPLETION, _RUN = {"-sc", "--shell-completion"}, {"-r", "--run"}


def _for_hydra(script: str, config_name: str, given: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A command line with flags as Hydra takes it, all jobs of -m checked. Raises UserError for what does not go together."""
    takes_word = (*_CONFIG, *_INFO, "-p", "--package")
    words = [word for before, word in itertools.pairwise(["", *given]) if word[:1] != "-" and before not in takes_word]
    many = not _MANY.isdisjoint(flags)
    overrides = [word for word in words if "=" in word or many]
    asking = (_CONFIG | _INFO | _COMPLETION | _RUN).intersection(flags)
    hydras = _MANY | _CONFIG | _INFO | _COMPLETION | {"--hydra-help", "--version"}
    if hydras.isdisjoint(flag.partition("=")[0] for flag in flags) or not _RUN.isdisjoint(flags):
        raise UserError(f"{' '.join(flags)} does nothing here; see python {Path(script).name} --help")
    launcher = next((word for word in words if word.startswith("hydra/launcher=")), None)
    _prepare_launcher(launcher, overwrites="overwrite=true" in words)
    if os.environ.get("TORCHELASTIC_RUN_ID") and many:
        raise UserError("-m starts a process for each run and cannot stand under torchrun; start torchrun for each run")
    if asking and many:
        raise UserError(f"-m and {min(asking)} cannot stand together; leave one out")
    more: list[str] = []
    if many or not _CONFIG.isdisjoint(flags):
        ours = [override for override in overrides if not override.startswith("hydra")]
        for choices in sweep_jobs(ours):
            check_config(config_name, choices)
        more = implied(config_name, ours) if asking else []
    # Behind the flags: argparse takes the words before a flag or those behind it, not both.
    behind = [forced(config_name, quoted(override)) for override in overrides]
    return [*(word for word in given if word not in overrides), *behind, *more]


def pasteable(script: str, arguments: Sequence[str]) -> str:
    """What starts this script again, for the shell and the folder that it was started from."""
    processes, nodes = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_WORLD_SIZE", "1")
    python = "python" if shutil.which("python") else "python3"  # Debian and macOS have no other
    start = [python] if processes is None else ["torchrun", f"--nproc-per-node={processes}"]
    if nodes != "1":
        start.append(f"--nnodes={nodes}")
    return shlex.join([*start, os.path.relpath(script), *arguments])


def run_child(command: Sequence[str]) -> tuple[int, int | None]:
    """The command's status, and the signal, if one came, that was passed on to it and waited for.

    It has a process group of its own, so that a Ctrl-C reaches it once, from here.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    # A hang-up that is ignored (nohup) stays ignored.
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, pass_on) for number in numbers}
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


def chosen_run(run: str | None, runs_dir: str) -> Path:
    """The run that a script is about, by folder or name; none named: the newest finished one. Raises UserError."""
    place = user_path(runs_dir)
    return newest_run(place) if run is None else find_run(run, place)


def chosen_folders(runs: Sequence[str], runs_dir: str) -> list[Path]:
    """Of each word the folder, a run's or another one, or else the run of that name below runs_dir. Raises UserError."""
    return [path if (path := user_path(run)).is_dir() else find_run(run, user_path(runs_dir)) for run in runs]


def newest_run(runs_dir: Path) -> Path:
    """The run that finished last. Raises UserError when none has."""
    done = finished_runs(runs_dir)
    if not done:
        raise UserError(f"no finished run in {runs_dir}; train one with: python train_model.py attention=mla")
    return done[-1]


def finished_runs(runs_dir: Path) -> list[Path]:
    """Runs with a summary.json, the one that finished last at the end.

    By the summary's own time: a copied file has another. Those that are older than this field come first, by name.
    """
    with readable(f"runs_dir={runs_dir}", "make it readable, or name another"):
        found = [folder / "summary.json" for folder in run_folders(runs_dir) if (folder / "summary.json").is_file()]
    return [path.parent for path in sorted(found, key=_finished_at)]


def _finished_at(summary: Path) -> str:
    try:
        return str(read_object(summary).get("finished_at") or "")
    except (OSError, Unreadable):  # said by whoever takes this run
        return ""
