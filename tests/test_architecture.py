"""What may import what, and the other rules of the architecture that a parser can check."""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("benchmarks", "eval_model", "harness", "modeling", "scripts", "tests", "train_model")
SOURCES = sorted([*ROOT.glob("*.py"), *(file for name in OURS for file in (ROOT / name).rglob("*.py"))])
PROJECT = [file for file in SOURCES if file.relative_to(ROOT).parts[0] != "tests"]

# The packages from the ground up: what each may import besides itself.
ARROWS: dict[str, tuple[str, ...]] = {
    "modeling.refusal": (),
    "modeling.kernels": ("modeling.refusal",),
    "modeling": (),
    "harness": (),
    "harness.errors": ("modeling.refusal",),
    "harness.files": ("harness.errors",),
    "harness.config": ("harness.files", "harness.errors", "modeling"),
    "harness.entry": ("harness.config", "harness.files", "harness.errors"),
    "harness.data": ("harness.config", "harness.files", "harness.errors"),
    "harness.tracking": ("harness.config", "harness.files", "harness.errors"),
    "harness.training": ("harness.config", "harness.files", "harness.errors", "modeling"),
    "harness.decode": ("harness.files", "harness.errors", "modeling"),
    "harness.evaluation": ("harness.data", "harness.config", "harness.files", "harness.errors", "modeling"),
    "harness.runs": (
        "harness.evaluation",
        "harness.training",
        "harness.tracking",
        "harness.data",
        "harness.config",
        "harness.files",
        "harness.errors",
        "modeling",
    ),
    "harness.hf": (
        "harness.runs",
        "harness.decode",
        "harness.evaluation",
        "harness.training",
        "harness.data",
        "harness.config",
        "harness.files",
        "harness.errors",
        "modeling",
    ),
    "harness.study": (
        "harness.runs",
        "harness.decode",
        "harness.evaluation",
        "harness.training",
        "harness.data",
        "harness.config",
        "harness.files",
        "harness.errors",
        "modeling",
    ),
    "harness.report": (
        "harness.study",
        "harness.runs",
        "harness.decode",
        "harness.evaluation",
        "harness.tracking",
        "harness.config",
        "harness.files",
        "harness.errors",
    ),
    "train_model": ("harness", "modeling"),
    "eval_model": ("harness", "modeling"),
    "scripts": ("harness", "modeling"),
    # train, or convert, and evaluate in one process
    "scripts.study_run": ("harness", "modeling", "train_model", "eval_model", "scripts.convert"),
    "benchmarks": ("harness", "modeling"),
    # these two run before anything is installed
    "harness.entry.bootstrap": (),
    "harness.entry.packages": (),
}

# A library that is heavy, optional or shapes everything that touches it -> the packages that import it.
ONLY_IN: dict[str, set[str]] = {
    "hydra": {"harness/config", "harness/entry"},
    "omegaconf": {"harness/config", "harness/entry"},
    "wandb": {"harness/tracking"},
    "trackio": {"harness/tracking"},
    "transformers": {"harness/hf"},
    "datasets": {"harness/data"},
    "huggingface_hub": {"harness/data"},
    "tokenizers": {"harness/data"},
    "pyarrow": {"harness/data"},
    "matplotlib": {"harness/report"},
    "jinja2": {"harness/report"},
    "markupsafe": {"harness/report"},
    "safetensors": {"harness/training", "harness/hf"},
    "scipy": {"harness/study", "harness/report"},
    "statsmodels": set(),  # the tests alone check estimates against it
    "triton": {"modeling/kernels", "benchmarks"},
    "flashinfer": {"modeling/kernels"},
    "fla": {"modeling/kernels"},
    "lm_eval": {"harness/hf"},
}
LAZY = (
    "wandb",
    "trackio",
    "transformers",
    "datasets",
    "huggingface_hub",
    "tokenizers",
    "pyarrow",
    "matplotlib",
    "jinja2",
    "markupsafe",
    "scipy",
    "statsmodels",
    "flashinfer",
    "fla",
    "lm_eval",
    "hydra",
    "omegaconf",
)

# A module that is itself imported only where it is chosen may begin with its library.
CHOSEN = {"harness.hf.own_class": {"transformers"}}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it; `from a import b` gives a.b, which may be a module."""
    package = module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{module} climbs with {'.' * node.level}"
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)


@functools.cache
def imported_by(file: Path, *, at_the_top: bool = False) -> tuple[str, ...]:
    """Of a file as a whole, or of its own statements alone: what is imported whenever it is."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if at_the_top:
        tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return tuple(imports(tree, name_of(file)))


def is_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def offences(name: str, imported: Iterable[str]) -> list[str]:
    """The imports of ours that a module may not have."""
    place = max((known for known in ARROWS if is_below(name, known)), key=len)
    ours = (target for target in imported if target.partition(".")[0] in OURS and target != "harness")
    return [target for target in ours if not any(is_below(target, prefix) for prefix in (place, *ARROWS[place]))]


@pytest.mark.parametrize("file", PROJECT, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_its_place_allows(file: Path) -> None:
    assert offences(name_of(file), imported_by(file)) == []


def test_the_harness_is_packages_and_the_errors() -> None:
    assert sorted(path.name for path in (ROOT / "harness").glob("*.py")) == ["__init__.py", "errors.py"]
    assert all(
        name in ARROWS
        for name in (f"harness.{path.name}" for path in (ROOT / "harness").iterdir() if (path / "__init__.py").exists())
    )


def test_packages_import_each_other_in_one_order() -> None:
    """Each names only packages that stand above it in ARROWS, so that there is no circle."""
    ours = [name for name in ARROWS if name.startswith("harness.") and name.count(".") == 1]
    for position, name in enumerate(ours):
        assert {target for target in ARROWS[name] if target.startswith("harness.")} <= set(ours[:position]), name


def test_nothing_that_runs_or_measures_imports_the_reports() -> None:
    names = {name_of(file): imported_by(file) for file in PROJECT}
    found = {
        name
        for name, imported in names.items()
        if not is_below(name, "harness.report") and any(is_below(target, "harness.report") for target in imported)
    }
    assert found and all(name.startswith("scripts.") for name in found)


def test_a_forbidden_arrow_would_be_noticed() -> None:
    planted = {
        "harness.training.loop": "def f():\n    from harness.data import prepare",
        "harness.data.loader": "import harness.training.device",
        "harness.tracking": "from harness.runs import folder",
        "harness.runs.evaluate_run": "from harness.hf import export",
        "harness.files.text": "from harness.config.schema import TrainConfig",
        "modeling.gpt": "from harness.errors import UserError",
        "modeling.kernels.attend": "from modeling.attention import rope",
        "harness.evaluation.perplexity": "from harness.runs.records import read_summary",
        "harness.entry.bootstrap": "from harness.errors import UserError",
        "scripts.generate": "import tests.support",
        "harness.report.page": "from harness.hf.export import export_run",
    }
    for module, source in planted.items():
        assert offences(module, imports(ast.parse(source), module)), module


@pytest.mark.parametrize("file", sorted((ROOT / "modeling").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_modeling_needs_torch_and_the_standard_library_alone(file: Path) -> None:
    tops = {name.partition(".")[0] for name in imported_by(file)}
    chosen = {file.stem.rpartition("_")[2]} & {"triton", "flashinfer", "fla"}  # imported when they are chosen
    assert tops - set(sys.stdlib_module_names) <= {"torch", "modeling"} | chosen


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_one_place(library: str) -> None:
    files = [file.relative_to(ROOT) for file in PROJECT if any(is_below(name, library) for name in imported_by(file))]
    found = {next((place for place in ONLY_IN[library] if file.is_relative_to(place)), str(file)) for file in files}
    assert found == ONLY_IN[library]


@pytest.mark.parametrize("file", PROJECT, ids=lambda file: str(file.relative_to(ROOT)))
def test_heavy_libraries_are_imported_where_they_are_needed_and_not_before(file: Path) -> None:
    names = set(imported_by(file, at_the_top=True))
    assert {name.partition(".")[0] for name in names}.isdisjoint(set(LAZY) - CHOSEN.get(name_of(file), set()))
    assert not any(is_below(name, module) for name in names for module in CHOSEN)


def circles(imported: Mapping[str, Iterable[str]]) -> list[str]:
    """The modules that import themselves by way of others; imported: by module, what it imports."""
    arrows = {
        module: {name if name in imported else name.rpartition(".")[0] for name in names} & imported.keys() - {module}
        for module, names in imported.items()
    }
    reached = {module: set(targets) for module, targets in arrows.items()}
    for between in arrows:  # Warshall's transitive closure
        for targets in reached.values():
            targets |= reached[between] if between in targets else set()
    return [module for module, targets in reached.items() if module in targets]


def test_no_modules_import_one_another() -> None:
    """Imports within functions and for types alone count too."""
    assert circles({name_of(file): imported_by(file) for file in PROJECT}) == []
    for_types = "if TYPE_CHECKING:\n    from modeling.attention import Attention"
    planted = {
        "modeling.attention": "from modeling.attention.mla import MultiheadLatentAttention",
        "modeling.attention.mla": "def f():\n    from modeling.attention.cache import Cache",
        "modeling.attention.cache": for_types,
        "modeling.attention.rope": "import torch",
        "modeling.gpt": "from modeling.attention.mla import MultiheadLatentAttention",
    }
    found = circles({module: tuple(imports(ast.parse(source), module)) for module, source in planted.items()})
    assert found == ["modeling.attention", "modeling.attention.mla", "modeling.attention.cache"]


def test_a_class_name_means_one_thing() -> None:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in PROJECT]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")
    assert [name for name, places in names.items() if places > 1] == []


def test_no_folder_or_file_of_ours_hides_a_package() -> None:
    taken = {"datasets", "evaluate", "kernels", "lm_eval", "tokenizers", "trackio", "transformers", "triton", "wandb"}
    modules = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert modules.isdisjoint(taken | set(sys.stdlib_module_names))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_configuration_holds_names_and_never_code(file: Path) -> None:
    assert "_target_" not in file.read_text(encoding="utf-8")


def test_code_folders_hold_no_data() -> None:
    suffixes = {
        path.suffix
        for name in ("harness", "modeling", "scripts")
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert suffixes <= {".py", ".sh", ".csv", ".j2"}  # .csv: the manifest of a corpus; .j2: the report's page
