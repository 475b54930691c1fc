"""What the documents say and can be checked: links, the sections and equations of every variant, its measured sizes."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.build import build_layer
from harness.config import load_train_config, options_of
from modeling.attention import MECHANISMS, MODEL_OWNED
from modeling.attention.contract import Variant

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md")])
ATTENTION = ROOT / "docs/ATTENTION.md"
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def links(document: Path) -> list[tuple[str, Path, str]]:
    """(text, file, fragment) of every link into this repository."""
    prose = FENCED.sub("", document.read_text(encoding="utf-8"))
    found = []
    for text, target in LINK.findall(prose):
        if not re.match(r"[a-z]+:", target):
            path, _, fragment = target.partition("#")
            found.append((text, (document.parent / path).resolve() if path else document, fragment))
    return found


def anchors(document: Path) -> set[str]:
    """The fragments that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(title: str) -> str:
    """The text of docs/ATTENTION.md under a heading of the second level."""
    for part in re.split(r"^## ", ATTENTION.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        if heading == title:
            return body
    raise AssertionError(f"docs/ATTENTION.md has no section '## {title}'")


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, headers and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = {i for i, line in enumerate(lines) if re.fullmatch(r"[|\s:-]+", line)}
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for i, line in enumerate(lines) if i not in rules and i + 1 not in rules
    ]  # fmt: skip


def sizes_table() -> dict[str, list[int]]:
    """Elements, bytes and parameters at `tiny`, then at `gpt2`, of every row of the table of sizes, by variant."""
    table = {}
    for name, _formula, *numbers in rows(section("Sizes")):
        table[re.sub(r"\[(\w+)\].*", r"\1", name)] = [int(number.replace(",", "")) for number in numbers]
    return table


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_resolves(document: Path) -> None:
    for text, path, fragment in links(document):
        assert path.is_relative_to(ROOT) and path.exists(), f"[{text}] leads to {path}, which does not exist"
        if fragment:
            assert fragment in anchors(path), f"[{text}] leads to #{fragment}, which {path.name} does not have"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_name_that_links_to_code_is_defined_there(document: Path) -> None:
    for text, path, _ in links(document):
        name = text.strip("`")
        if path.suffix == ".py" and name.isidentifier():
            defined = re.search(
                rf"^\s*(def|class) {name}\b|^{name}\b.*=", path.read_text(encoding="utf-8"), re.MULTILINE
            )
            assert defined, f"{path.relative_to(ROOT)} does not define {name}"


def test_every_test_that_the_page_on_reliability_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/RELIABILITY.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, name in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file} has no {name}"


@pytest.mark.parametrize("variant", options_of("attention"))
def test_every_variant_has_equations_a_diagram_and_its_cached_tensors(variant: str) -> None:
    body = section(variant)
    assert f"(../configs/attention/{variant}.yaml)" in body, "the section does not link the variant's YAML"
    assert "```text\n" in body and "```mermaid\n" in body, "equations (text) or diagram (mermaid) is missing"
    layer: Variant = build_layer(load_train_config([f"attention={variant}"]))
    assert set(re.findall(r"cached: (\w+)", body)) == set(layer.cache_shapes)
    drawn = re.findall(r'(\w+)\[\("', body)
    marked = re.search(r"^ +class ([\w,]+) cached$", body, re.MULTILINE)
    assert len(drawn) == len(layer.cache_shapes), f"the diagram shows {drawn} as cached"
    assert marked and sorted(marked[1].split(",")) == sorted(drawn)


def test_the_table_of_sizes_is_what_the_command_beside_it_measures() -> None:
    program = re.search(r"^python - <<'EOT'\n(.*?)^EOT$", section("Sizes"), re.MULTILINE | re.DOTALL)
    assert program, "the section on sizes shows no command"
    done = subprocess.run([sys.executable, "-c", program[1]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        variant, _size, *numbers = line.split()
        printed.setdefault(variant, []).extend(map(int, numbers))
    assert sorted(printed) == options_of("attention")
    assert sizes_table() == printed


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_option_of_a_class_is_described(mechanism: str) -> None:
    options = set(inspect.signature(MECHANISMS[mechanism].__init__).parameters) - {"self", *MODEL_OWNED}
    undescribed = {option for option in options if f"`{option}`" not in section("Knobs")}
    assert not undescribed, f"'## Knobs' says nothing of {sorted(undescribed)}"


def test_every_module_in_the_map_of_names_exists() -> None:
    named: set[str] = set()
    for overrides in ([], ["attention.q_lora_rank=16"], ["attention.fused_down_projections=true"]):
        layer = build_layer(load_train_config(["attention=mla", *overrides]))
        named |= {name.removesuffix(".weight") for name, _ in layer.named_parameters()}
    mapped = {row[0].strip("`") for row in rows(section("Names elsewhere"))}
    assert mapped >= named, f"the map does not name {sorted(named - mapped)}"
    modules = {name for name in mapped if "proj" in name or "norm" in name}
    assert modules <= named, f"no such modules: {sorted(modules - named)}"
