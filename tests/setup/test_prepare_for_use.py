"""prepare_for_use.sh, run for real: true virtual environments and a true pip, tiny wheels in place of large ones."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.projects import BASE_PYTHON, ROOT, SmallProject, installed, make_environment, site_packages

# Stands for an old interpreter: answers the question for its version, and knows of no virtual environment.
PYTHON_3_9 = 'case "$*" in *version_info*) echo 3.9 ;; esac'

PINS = {"torch": "2.13.0", "alpha": "1.0", "beta": "2.0", "gamma": "3.0"}


@pytest.fixture
def project(tmp_path: Path) -> SmallProject:
    return SmallProject(tmp_path / "a project")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallProject, str]:
    """A project that has been set up once, and what that printed."""
    project = SmallProject(tmp_path_factory.mktemp("prepared") / "a project")
    result = project.set_up()
    assert result.returncode == 0, result.stderr
    return project, result.stdout


@pytest.fixture(scope="module")
def prepared(first_run: tuple[SmallProject, str]) -> SmallProject:
    """The same project; tests that use it leave it whole."""
    return first_run[0]


def test_on_a_bare_machine_it_makes_the_environment_installs_every_pin_and_prepares_data(
    first_run: tuple[SmallProject, str],
) -> None:
    project, output = first_run
    assert installed(project.environment) == PINS
    assert project.data_step() == {"argv": [], "prefix": str(project.environment), "folder": str(project.folder)}
    assert "Ready" in output
    assert not list(project.environment.glob("*unfinished*"))


def test_the_next_command_trains_on_what_was_prepared(prepared: SmallProject) -> None:
    for arguments, next_command in (
        ([], "python train_model.py attention=mla"),
        (["stdlib", "tinystories", "tokenizer=bytes"], "python train_model.py attention=mla dataset=stdlib tokenizer=bytes"),
    ):
        assert prepared.set_up(*arguments).stdout.splitlines()[-1] == f"== Ready. Next: {next_command}"
        prepared.data_step()


def test_a_second_run_installs_nothing(prepared: SmallProject) -> None:
    before = site_packages(prepared.environment).stat().st_mtime_ns
    result = prepared.set_up()
    assert result.returncode == 0, result.stderr
    assert "Packages: all there" in result.stdout and "Installing" not in result.stdout
    assert site_packages(prepared.environment).stat().st_mtime_ns == before
    prepared.data_step()


def test_from_any_folder_the_arguments_reach_the_data_step_as_they_were_typed(prepared: SmallProject, tmp_path: Path) -> None:
    arguments = ["stdlib", "dataset.path=my texts (old)/*.txt", "a=$HOME", ""]
    result = prepared.set_up(*arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    called = prepared.data_step()
    assert called["argv"] == arguments
    assert Path(called["folder"]) == tmp_path


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["stdlib", "--help"]])
def test_help_is_the_comment_at_its_head_and_does_nothing(project: SmallProject, tmp_path: Path, arguments: list[str]) -> None:
    before = sorted(project.folder.rglob("*"))
    result = project.set_up(*arguments, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    head = (project.folder / "prepare_for_use.sh").read_text().split("\nset -eu")[0].splitlines()[1:]
    assert result.stdout.splitlines() == [line[1:].removeprefix(" ") for line in head]
    assert "sh prepare_for_use.sh stdlib tinystories" in result.stdout
    assert sorted(project.folder.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["-x"], ["stdlib", "--verbose"]])
def test_an_unknown_flag_is_refused_before_anything_is_made(project: SmallProject, arguments: list[str]) -> None:
    assert_refused(project.set_up(*arguments), arguments[-1], "--help")
    assert not project.environment.exists()


def test_a_failing_data_step_fails_the_set_up(prepared: SmallProject) -> None:
    script = prepared.folder / "scripts" / "prepare_data.py"
    text = script.read_text()
    script.write_text("raise SystemExit(3)")
    try:
        result = prepared.set_up()
    finally:
        script.write_text(text)
    assert result.returncode == 3
    assert "Ready" not in result.stdout


def give_pip(environment: Path, prepared: SmallProject) -> None:
    """pip copied from another environment: ensurepip, which the tests above have run, takes seconds."""
    for folder in site_packages(prepared.environment).glob("pip*"):
        shutil.copytree(folder, site_packages(environment) / folder.name)


@pytest.mark.parametrize("how", ["VIRTUAL_ENV", "conda", "PATH"])
def test_the_active_environment_is_used_and_no_other_is_made(
    project: SmallProject, prepared: SmallProject, tmp_path: Path, how: str
) -> None:
    active = tmp_path / "mine"
    make_environment(active)
    if how != "conda":  # that one gets pip by ensurepip, as environments of other makers do
        give_pip(active, prepared)
    environ = {
        "VIRTUAL_ENV": {"VIRTUAL_ENV": str(active)},
        "conda": {"CONDA_PREFIX": str(active), "CONDA_DEFAULT_ENV": "mine"},
        "PATH": {"PATH": f"{active}/bin:{project.bin}"},
    }[how]
    result = project.set_up(**environ)
    assert result.returncode == 0, result.stderr
    assert installed(active) == PINS
    assert project.data_step()["prefix"] == str(active)
    assert not project.environment.exists()


def test_the_base_environment_of_conda_is_left_alone(project: SmallProject, tmp_path: Path) -> None:
    make_environment(tmp_path / "conda")
    (project.bin / "python3").unlink()  # so that it must stop rather than make an environment
    result = project.set_up(CONDA_PREFIX=str(tmp_path / "conda"), CONDA_DEFAULT_ENV="base")
    assert result.returncode == 2
    assert installed(tmp_path / "conda") == {}


def test_a_virtual_env_variable_that_points_nowhere_is_said_and_ignored(prepared: SmallProject) -> None:
    result = prepared.set_up(VIRTUAL_ENV="/nowhere/env")
    assert result.returncode == 0
    assert "/nowhere/env" in result.stderr
    assert prepared.data_step()["prefix"] == str(prepared.environment)


@pytest.mark.parametrize(
    ("version", "code", "kept"),
    [("2.11.0a0+nv", "", True), ("2.12.0", "", True), ("2.10.1", "", False), ("2.12.0", "raise ImportError", False)],
)
def test_only_a_torch_that_is_new_enough_and_imports_is_kept(
    project: SmallProject, prepared: SmallProject, tmp_path: Path, version: str, code: str, kept: bool
) -> None:
    active = tmp_path / "mine"
    make_environment(active, ["torch"])
    give_pip(active, prepared)
    (site_packages(active) / "torch" / "__init__.py").write_text(f"__version__ = '{version}'\n{code}\n")
    info = site_packages(active) / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (info / "RECORD").write_text(f"torch/__init__.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    result = project.set_up(VIRTUAL_ENV=str(active))
    assert result.returncode == 0, result.stderr
    assert installed(active) == PINS | {"torch": version if kept else "2.13.0"}
    again = project.set_up(VIRTUAL_ENV=str(active))
    assert "Packages: all there" in again.stdout


def test_what_failed_to_install_is_said_and_completed_later(
    project: SmallProject, prepared: SmallProject, tmp_path: Path
) -> None:
    active = tmp_path / "mine"
    make_environment(active)
    give_pip(active, prepared)
    wheel = next(project.wheels.glob("gamma*"))
    wheel.rename(tmp_path / wheel.name)
    result = project.set_up(VIRTUAL_ENV=str(active))
    assert result.returncode == 2
    assert "run this again" in result.stderr
    assert not (project.folder / "scripts" / "called.json").exists()
    (tmp_path / wheel.name).rename(wheel)
    assert project.set_up(VIRTUAL_ENV=str(active)).returncode == 0
    assert installed(active) == PINS


@pytest.mark.parametrize("state", ["cut off before its scripts", "its python is gone", "empty"])
def test_an_environment_that_is_not_whole_is_made_anew(project: SmallProject, state: str) -> None:
    project.need_no_packages()
    project.environment.mkdir()
    if state != "empty":
        make_environment(project.environment)
    if state == "cut off before its scripts":
        (project.environment / "bin" / "activate").unlink()
    if state == "its python is gone":
        for python in project.environment.glob("bin/python*"):
            python.unlink()
            python.symlink_to("/nowhere/python")
    result = project.set_up()
    assert result.returncode == 0, result.stderr
    assert "made anew" in result.stdout
    assert Path(project.data_step()["prefix"]) == project.environment
    assert (project.environment / "bin" / "activate").exists()


@pytest.mark.parametrize("state", ["truncated", "file missing", "no INSTALLER", "no RECORD", "no METADATA"])
def test_a_package_that_pip_left_half_unpacked_is_installed_again(prepared: SmallProject, state: str) -> None:
    unfinished = prepared.environment / "prepare_for_use.unfinished"
    unfinished.write_text("alpha==1.0\n")
    os.utime(unfinished, (0, 0))
    packages = site_packages(prepared.environment)
    info = packages / "alpha-1.0.dist-info"
    damage = {
        "truncated": lambda: (packages / "alpha" / "part7.py").write_text(""),
        "file missing": lambda: (packages / "alpha" / "part7.py").unlink(),
        "no INSTALLER": lambda: (info / "INSTALLER").unlink(),
        "no RECORD": lambda: (info / "RECORD").unlink(),
        "no METADATA": lambda: (info / "METADATA").unlink(),
    }[state]
    damage()
    result = prepared.set_up()
    assert result.returncode == 0, result.stderr
    assert "alpha-1.0 is only half there" in result.stdout
    assert (packages / "alpha" / "part7.py").read_text() == "x = 7\n"
    assert {path.name for path in info.iterdir()} >= {"METADATA", "RECORD", "INSTALLER"}
    assert not unfinished.exists()
    prepared.data_step()


def test_a_broken_package_that_set_up_did_not_touch_is_left_alone(prepared: SmallProject) -> None:
    packages = site_packages(prepared.environment)
    users = packages / "users_own-1.0.dist-info"
    users.mkdir()
    os.utime(users, (1, 1))
    unfinished = prepared.environment / "prepare_for_use.unfinished"
    unfinished.touch()
    try:
        assert prepared.set_up().returncode == 0
        assert users.exists()
    finally:
        users.rmdir()
    prepared.data_step()


@pytest.mark.slow
def test_killed_again_and_again_it_completes(project: SmallProject) -> None:
    delay, kills = 0.05, 0
    while True:
        process = subprocess.Popen(
            project.command(),
            env=project.environ(),
            cwd=project.folder,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            if process.wait(delay) == 0:
                break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        delay *= 1.2
        assert delay < 120, "it does not complete"
    assert kills > 5
    assert installed(project.environment) == PINS
    parts = site_packages(project.environment) / "alpha"
    assert [(parts / f"part{i}.py").read_text() for i in range(200)] == [f"x = {i}\n" for i in range(200)]
    subprocess.run([project.environment / "bin" / "python", "-m", "pip", "check"], check=True)


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2 and one sentence on standard error that holds the words."""
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_an_unsupported_python_gets_one_sentence_with_its_version(project: SmallProject) -> None:
    project.put_on_path("python3", PYTHON_3_9)
    project.put_on_path("python3.13", "exit 127")  # a version manager's shim for a version that is not chosen
    assert_refused(project.set_up(), "python3 is 3.9", "3.11, 3.12 or 3.13")
    assert not project.environment.exists()


def test_a_newer_named_python_is_found_beside_an_unsupported_one(project: SmallProject) -> None:
    project.need_no_packages()
    (project.bin / "python3").rename(project.bin / BASE_PYTHON.name)
    project.put_on_path("python3", PYTHON_3_9)
    assert project.set_up().returncode == 0
    assert Path(project.data_step()["prefix"]) == project.environment


def test_no_python_at_all_gets_one_sentence(project: SmallProject) -> None:
    (project.bin / "python3").unlink()
    assert_refused(project.set_up(), "3.11, 3.12 or 3.13", "install one")


def test_a_python_without_its_venv_module_gets_one_sentence(project: SmallProject) -> None:
    project.put_on_path("python3", f'case "$*" in *ensurepip*) exit 1 ;; esac\nexec "{BASE_PYTHON}" "$@"')
    assert_refused(project.set_up(), "python3-venv")
    assert not project.environment.exists()


def test_an_active_environment_with_an_unsupported_python_is_refused(project: SmallProject, tmp_path: Path) -> None:
    python = tmp_path / "old" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 3.10\n")
    python.chmod(0o755)
    assert_refused(project.set_up(VIRTUAL_ENV=str(tmp_path / "old")), "3.10", "deactivate")


def test_an_environment_of_the_users_own_in_the_project_is_refused_not_removed(project: SmallProject) -> None:
    python = project.environment / "bin" / "python"
    python.parent.mkdir(parents=True)
    (python.parent / "activate").touch()
    python.write_text("#!/bin/sh\necho 3.10\n")
    python.chmod(0o755)
    assert_refused(project.set_up(), "3.10", "remove that folder")
    assert python.exists()


REQUIREMENT_FILES = sorted(file.name for file in ROOT.glob("requirements*.txt"))


def requirements(file: str) -> tuple[list[str], list[str]]:
    """The `name==version` lines of a file and the files that it includes, without comments."""
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    included = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    return [line for line in lines if line and not line.startswith("-r ")], included


@pytest.mark.parametrize("file", REQUIREMENT_FILES)
def test_every_requirement_names_exactly_one_version(file: str) -> None:
    lines, included = requirements(file)
    assert lines and all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.+]*", line) for line in lines)
    assert set(included) <= set(REQUIREMENT_FILES)
    if file == "requirements.txt":
        assert lines[0] == "torch==2.13.0"


def test_every_package_is_pinned_in_one_place() -> None:
    beside = "requirements-transformers4.txt"  # another version, in a folder of its own that one test reads
    files = [file for file in REQUIREMENT_FILES if file != beside]
    assert len(files) == len(REQUIREMENT_FILES) - 1
    names = [line.split("==")[0] for file in files for line in requirements(file)[0]]
    assert len(names) == len(set(names))


def test_the_extras_bring_the_kernels_package() -> None:
    assert requirements("requirements-extra.txt")[1] == ["requirements-kernels.txt"]
    assert [line.split("==")[0] for line in requirements("requirements-kernels.txt")[0]] == ["triton"]
