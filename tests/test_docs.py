"""What the documents say and can be checked: links, the sections and equations of every variant, its measured sizes."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from harness.config.build import build_layer, build_layers, layers_that_differ
from harness.config.compose import load_train_config, options_of
from modeling.attention import MECHANISMS, MODEL_OWNED
from modeling.attention.contract import Variant

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md")])
ATTENTION = ROOT / "docs/ATTENTION.md"
README = ROOT / "README.md"
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
        for i, line in enumerate(lines)
        if i not in rules and i + 1 not in rules
    ]


def sizes_table() -> dict[str, list[int]]:
    """Elements, bytes and parameters at `tiny`, then at `gpt2`, of every row of the table of sizes, by variant."""
    table = {}
    for name, _formula, *numbers in rows(section("Sizes")):
        table[re.sub(r"\[(\w+)\].*", r"\1", name)] = [int(number.replace(",", "")) for number in numbers]
    return table


def broken_tables(text: str) -> list[str]:
    """Rows that a Markdown reader does not show as their table's: no header and rule above, or other numbers of cells."""
    faults, table = list[str](), list[str]()
    for line in [*FENCED.sub("", text).splitlines(), ""]:
        if line.lstrip().startswith("|"):
            table.append(line.strip())
            continue
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table]
        if table and (len(table) < 2 or not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", table[1])):
            faults.append(table[0])
        faults += [row for row, count in zip(table, cells, strict=True) if count != cells[0]]
        table = []
    return faults


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_row_of_a_table_belongs_to_one(document: Path) -> None:
    assert broken_tables(document.read_text(encoding="utf-8")) == []


def test_a_broken_table_would_be_noticed() -> None:
    good = "| a | b |\n|---|--:|\n| 1 | x \\| y |\n"
    assert broken_tables(f"words\n\n{good}\n```\n| no table\n```\n\n{good}") == []
    assert broken_tables(good.replace("| 1", "\n| 1")) == ["| 1 | x \\| y |"]
    assert broken_tables(good + "| 2 |\n") == ["| 2 |"]


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
            defined = re.search(rf"^\s*(def|class) {name}\b|^{name}\b.*=", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert defined, f"{path.relative_to(ROOT)} does not define {name}"


def test_every_test_that_the_page_on_reliability_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/RELIABILITY.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, name in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file} has no {name}"


def documented() -> list[str]:
    """The variants of which docs/ATTENTION.md says more than a word; others are somebody's own."""
    return sorted(set(options_of("attention")) & set(re.findall(r"^## (\w+)$", ATTENTION.read_text(), re.MULTILINE)))


def test_every_variant_that_the_readme_offers_is_documented() -> None:
    table = re.search(r"^\| `attention=`.*?\n\n", README.read_text(encoding="utf-8"), re.M | re.S)
    assert table
    offered = [name for row in table[0].strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(offered) == documented()


def test_no_file_holds_the_marks_of_a_merge() -> None:
    marks = re.compile(r"^(<{7}|={7}|>{7})( |$)", re.MULTILINE)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.splitlines()] if listed.returncode == 0 else DOCUMENTS
    texts = [file for file in files if file.suffix in (".md", ".py", ".sh", ".yaml", ".toml", ".txt", ".cff", ".j2")]
    assert [str(file.relative_to(ROOT)) for file in texts if marks.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("variant", documented())
def test_every_variant_has_equations_a_diagram_and_its_cached_tensors(variant: str) -> None:
    body = section(variant)
    assert f"(../configs/attention/{variant}.yaml)" in body, "the section does not link the variant's YAML"
    assert "```text\n" in body and "```mermaid\n" in body, "equations (text) or diagram (mermaid) is missing"
    config = load_train_config([f"attention={variant}"])
    layers: list[Variant] = build_layers(config, layers_that_differ(config)).attentions
    cached = {name for layer in layers for name in (*layer.cache_shapes, *getattr(layer, "state_shapes", ()))}
    assert set(re.findall(r"cached: (\w+)", body)) == cached
    drawn = re.findall(r'(\w+)\[\("', body)
    marked = re.search(r"^ +class ([\w,]+) cached$", body, re.MULTILINE)
    assert len(drawn) == len(cached), f"the diagram shows {drawn} as cached"
    assert marked and sorted(marked[1].split(",")) == sorted(drawn)


def test_the_table_of_sizes_is_what_the_command_beside_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    program = re.search(r"^python - <<'EOT'\n(.*?)^EOT$", section("Sizes"), re.MULTILINE | re.DOTALL)
    assert program, "the section on sizes shows no command"
    exec(program[1], {})
    printed: dict[str, list[int]] = {}
    for line in capsys.readouterr().out.splitlines():
        variant, _size, *numbers = line.split()
        printed.setdefault(variant, []).extend(map(int, numbers))
    assert sorted(printed) == options_of("attention")
    assert sizes_table() == {variant: printed[variant] for variant in documented()}


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/studies/*/report.html")), ids=lambda page: page.parent.name)
def test_a_published_report_names_the_best_arm_has_a_command_that_writes_it_and_is_dark_where_that_is_wished(
    page: Path,
) -> None:
    text = page.read_text(encoding="utf-8")
    verdict = text.partition('id="verdict"')[2].partition("</section>")[0]
    assert re.search(r"<p>(Lowest|Highest) test [^:]+: \w+, ", verdict)
    command = text.partition("writes the report again:")[2].partition("</pre>")[0]
    assert f"python scripts/run_study.py study={page.parent.name}" in command and "report=" not in command
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert not re.search(r'(?:fill|stroke)="#', text)


def test_the_time_of_the_demo_is_said_in_one_place() -> None:
    """Elsewhere it went out of date unseen: half a sentence in three files, with three numbers."""
    said = [
        f"{path.relative_to(ROOT)}: {sentence}"
        for path in (*DOCUMENTS, *ROOT.glob("configs/study/demo.yaml"), ROOT / "scripts/run_study.py")
        for sentence in re.findall(r"[^\n]*\bdemo\b[^\n]*(?:minute|\bmin\b)[^\n]*", path.read_text(encoding="utf-8"))
    ]
    assert len(said) == 1 and said[0].startswith("docs/STUDIES.md: The demo takes about 10 minutes"), said


@pytest.mark.parametrize(
    "mechanism",
    sorted(
        {
            kind["mechanism"]
            for name in documented()
            for variant in [yaml.safe_load((ROOT / f"configs/attention/{name}.yaml").read_text())]
            for kind in (variant, *variant.get("kinds", {}).values())
            if "mechanism" in kind
        }
    ),
)
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
