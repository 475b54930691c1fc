"""What may import what, and the other rules of the architecture that a parser can check."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("benchmarks", "eval_model", "harness", "modeling", "scripts", "tests", "train_model")
SOURCES = sorted([*ROOT.glob("*.py"), *(file for name in OURS for file in (ROOT / name).rglob("*.py"))])
PROJECT = [file for file in SOURCES if file.relative_to(ROOT).parts[0] != "tests"]

# A package or module -> what of ours it may import, itself included: the longest prefix that matches a file counts.
ARROWS: dict[str, tuple[str, ...]] = {
    "modeling": ("modeling",),
    "modeling.kernels": ("modeling.kernels",),
    "harness.errors": (),
    "harness.schema": (),
    "harness.bootstrap": (),
    "harness.packages": (),
    "harness.outside": (),
    "harness.data": ("harness.data", "harness.schema", "harness.errors", "harness.outside"),
    "harness.tracking": ("harness.tracking", "harness.schema", "harness.errors"),
    "harness.training": ("harness.training", "harness.schema", "harness.errors", "harness.outside", "modeling"),
    "harness.evaluation": ("harness.evaluation", "harness.schema", "harness.errors", "modeling"),
    "harness.study.statistics": ("harness.errors",),
    "harness.study.drawing": (),
    "harness.comparison": ("harness.errors", "harness.outside"),
    "harness.comparison_plot": ("harness.comparison",),
    "harness.config": ("harness.schema", "harness.errors", "modeling"),
    "harness.command_line": ("harness.config", "harness.errors"),
    "harness": ("harness", "modeling"),  # what assembles a run: build, facts, run, session, score
    "train_model": ("harness", "modeling"),
    "eval_model": ("harness", "modeling"),
    "scripts": ("harness", "modeling"),
    # train, or convert, and evaluate in one process
    "scripts.study_run": ("harness", "modeling", "train_model", "eval_model", "scripts.convert"),
    "benchmarks": ("harness", "modeling"),
}

# A library that is heavy, optional or shapes everything that touches it -> the files that may import it.
ONLY_IN: dict[str, set[str]] = {
    "hydra": {"harness/config.py", "harness/command_line.py"},
    "omegaconf": {"harness/config.py", "harness/command_line.py"},
    "wandb": {"harness/tracking/wandb_run.py"},
    "trackio": {"harness/tracking/trackio_run.py"},
    "transformers": {"harness/huggingface.py", "harness/huggingface_own.py"},
    "datasets": {"harness/data/hub.py"},
    "huggingface_hub": {"harness/data/hub_client.py"},
    "tokenizers": {"harness/data/tokenizer.py"},
    "pyarrow": {"harness/data/parquet.py"},
    "matplotlib": {"harness/comparison_plot.py", "harness/evaluation/decode_plot.py", "harness/study/figures.py"},
    "safetensors": {"harness/training/checkpoint.py"},
    "scipy": {"harness/study/statistics.py"},
    "statsmodels": {"harness/study/statistics.py"},
    "triton": {"modeling/kernels/latent_decode_triton.py", "benchmarks/latent_decode.py"},
    "lm_eval": {"harness/evaluation/lm_eval.py"},
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
    "scipy",
    "statsmodels",
    "lm_eval",
    "hydra",
    "omegaconf",
)

# A module that is itself imported only where it is chosen may begin with its library.
CHOSEN = {"harness.huggingface_own": {"transformers"}}


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


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def is_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def offences(name: str, imported: Iterator[str]) -> list[str]:
    """The imports of ours that a module may not have."""
    rule = max((known for known in ARROWS if is_below(name, known)), key=len)
    allowed = ARROWS[rule]
    ours = (target for target in imported if target.partition(".")[0] in OURS)
    return [target for target in ours if not any(is_below(target, prefix) for prefix in allowed)]


@pytest.mark.parametrize("file", PROJECT, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_its_place_allows(file: Path) -> None:
    assert offences(name_of(file), imports(parsed(file), name_of(file))) == []


def test_a_forbidden_arrow_would_be_noticed() -> None:
    planted = {
        "harness.training.loop": "def f():\n    from harness.data import prepare",
        "harness.data.loader": "import harness.training.device",
        "harness.tracking": "from harness import config",
        "modeling.gpt": "from harness.errors import UserError",
        "modeling.kernels.attend": "from modeling.attention import rope",
        "harness.evaluation.perplexity": "from harness.data import TokenSplit",
        "scripts.generate": "import tests.support",
    }
    for module, source in planted.items():
        assert offences(module, imports(ast.parse(source), module)), module


@pytest.mark.parametrize(
    "file", sorted((ROOT / "modeling").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT))
)
def test_modeling_needs_torch_and_the_standard_library_alone(file: Path) -> None:
    tops = {name.partition(".")[0] for name in imports(parsed(file), name_of(file))}
    chosen = {"triton"} if file.name.endswith("_triton.py") else set()
    assert tops - set(sys.stdlib_module_names) <= {"torch", "modeling"} | chosen


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_one_place(library: str) -> None:
    found = {
        str(file.relative_to(ROOT)) for file in PROJECT
        if any(is_below(name, library) for name in imports(parsed(file), name_of(file)))
    }  # fmt: skip
    assert found == ONLY_IN[library]


@pytest.mark.parametrize("file", PROJECT, ids=lambda file: str(file.relative_to(ROOT)))
def test_heavy_libraries_are_imported_where_they_are_needed_and_not_before(file: Path) -> None:
    top_level = ast.Module([node for node in parsed(file).body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    names = set(imports(top_level, name_of(file)))
    assert {name.partition(".")[0] for name in names}.isdisjoint(set(LAZY) - CHOSEN.get(name_of(file), set()))
    assert not any(is_below(name, module) for name in names for module in CHOSEN)


def test_no_folder_or_file_of_ours_hides_a_package() -> None:
    taken = {"datasets", "evaluate", "kernels", "lm_eval", "tokenizers", "trackio", "transformers", "triton", "wandb"}
    modules = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert modules.isdisjoint(taken | set(sys.stdlib_module_names))


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: str(file.relative_to(ROOT))
)
def test_a_configuration_holds_names_and_never_code(file: Path) -> None:
    assert "_target_" not in file.read_text(encoding="utf-8")


def test_code_folders_hold_no_data() -> None:
    suffixes = {path.suffix for name in ("harness", "modeling", "scripts") for path in (ROOT / name).rglob("*")
                if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert suffixes <= {".py", ".sh", ".csv"}  # .csv: the manifest of a corpus
