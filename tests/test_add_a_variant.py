"""What docs/ADD_A_VARIANT.md tells its reader to do is done here, in a copy of the project."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config.checks import typed_attention
from harness.config.compose import load_train_config
from harness.errors import UserError
from modeling.attention import MECHANISMS
from tests.support.forks import Ended, Forks
from tests.support.projects import block, copy_project

DOCUMENT = "docs/ADD_A_VARIANT.md"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which its three steps were taken, and a text beside it."""
    project = tmp_path_factory.mktemp("added") / "project"
    copy_project(project)
    for path in ("modeling/attention/shared.py", "configs/attention/shared.yaml"):
        (project / path).write_text(block(DOCUMENT, f"add a variant: {path}"), encoding="utf-8")
    table = project / "modeling" / "attention" / "__init__.py"
    import_line, entry = block(DOCUMENT, "add a variant: MECHANISMS").splitlines()
    text = table.read_text(encoding="utf-8")
    last_import = "from modeling.attention.mla import MultiheadLatentAttention\n"
    last_entry = '    "mla": MultiheadLatentAttention,  # and what differs from it by options\n'
    assert last_import in text and last_entry in text
    text = text.replace(last_import, f"{last_import}{import_line}\n").replace(last_entry, f"{last_entry}{entry}\n")
    table.write_text(text, encoding="utf-8")
    lines = "\n".join(f"line {i} of a small corpus" for i in range(400))
    (project.parent / "text.txt").write_text(lines, encoding="utf-8")
    return project


@pytest.fixture(scope="module")
def forks(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts the commands of that copy."""
    forks = Forks(tmp_path_factory.mktemp("forks"), project, imported=["transformers.modeling_utils", "matplotlib.pyplot"])
    yield forks
    forks.close()


def run(forks: Forks, script: str, *arguments: str) -> Ended:
    """A command that does what it was asked for."""
    done = forks.run(script, *arguments)
    assert done.status == 0, done.output + done.errors
    return done


def last_line(done: Ended) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    return record


def setup(project: Path) -> list[str]:
    return ["dataset=local", f"dataset.path={project.parent / 'text.txt'}", "tokenizer=bytes", "tracking=none", "device=cpu"]


@pytest.fixture(scope="module")
def trained(project: Path, forks: Forks) -> str:
    """The name of the run."""
    few = ["attention=shared", "name=own", "budget.steps=2", "evaluation.max_tokens=512"]
    done = run(forks, "train_model.py", *few, *setup(project))
    assert last_line(done)["attention"] == "shared"
    return "own"


BYTES = 4 * 32 * 2  # layers, head_dim, bfloat16


def test_the_steps_that_add_a_variant_add_one_that_keeps_the_contract(forks: Forks) -> None:
    checked = run(forks, "scripts/check_attention.py", "attention=shared")
    assert "16 of 16 hold" in checked.output and f"KV cache    {BYTES} bytes per token in bfloat16" in checked.output
    found = run(forks, "scripts/run_tests.py", "-n", "0", "-q", "tests/modeling/test_contract.py", "-k", "shared", "--co")
    assert "test_contract[output_has_the_inputs_shape_and_dtype-shared]" in found.output, found.output + found.errors


def test_the_variant_is_trained_evaluated_compared_and_written_with(project: Path, forks: Forks, trained: str) -> None:
    summary = json.loads((project / "runs" / trained / "summary.json").read_text())
    assert summary["cache_bytes_per_token"] == BYTES and summary["cache_elements_per_token_per_layer"] == 32
    last_line(run(forks, "eval_model.py", f"run={trained}", "max_tokens=512", "tracking=none", "device=cpu"))
    (evaluation,) = (project / "runs" / trained / "evaluations").glob("*.json")
    assert json.loads(evaluation.read_text())["extras"]["latents"] is None
    written = run(forks, "scripts/generate.py", f"run={trained}", "prompt=line 1", "max_new_tokens=8", "device=cpu")
    assert "keys and values as they are cached" in written.errors, written.errors
    compared = run(forks, "scripts/compare_runs.py", "tracking=none")
    assert re.search(rf"^shared .* {BYTES} ", compared.output, re.M), compared.output


def test_the_variant_is_exported_as_our_own_class_with_the_same_logits(project: Path, forks: Forks, trained: str) -> None:
    pytest.importorskip("transformers")
    exported = run(forks, "scripts/export.py", f"run={trained}", "to=exported")
    assert "our own, because no stock one that we write has attention.mechanism=shared" in exported.output
    program = project / "difference.py"
    program.write_text(
        "import torch; from pathlib import Path; from harness.hf import classes; "
        "from harness.runs.load import load_trained; "
        "from modeling.attention import EXECUTION; classes.register(); theirs, _ = classes.load(Path('exported')); "
        f"ours = load_trained(Path('runs/{trained}'), device=torch.device('cpu'), precision=torch.float32, "
        "execution=EXECUTION).model; print(classes.difference(ours, theirs))"
    )
    assert float(run(forks, str(program)).output.splitlines()[-1]) < 1e-6
    refused = forks.run("scripts/export.py", f"run={trained}", "to=stock", "kind=stock")
    assert refused.status == 2 and "is no model of transformers" in refused.errors


def test_the_variant_is_timed_without_a_peer_and_its_cache_is_calculated(forks: Forks, trained: str) -> None:
    tiny = ["contexts=16", "batch_sizes=1", "steps=2", "rounds=1", "device=cpu", "memory_budget_gib=0.25"]
    for chosen in (["attention=shared"], [f"run={trained}"], ["attention=shared", "level=attention"]):
        timed = run(forks, "scripts/benchmark_decode.py", *chosen, *tiny)
        peer = "no transformers beside shared: " in timed.output
        assert peer is ("level=attention" not in chosen)
    for chosen in (["attention=shared"], [f"run={trained}"]):
        counted = json.loads(run(forks, "scripts/kv_calculator.py", *chosen, "json=true").output)
        assert counted["bytes_per_token"] == counted["measured"]["bytes_per_token"] == BYTES


def test_the_variant_is_an_arm_of_a_study(project: Path, forks: Forks) -> None:
    (project / "configs" / "study" / "own.yaml").write_text(
        "question: Does a variant of one's own take part?\n"
        f"base: [{', '.join(setup(project)[:3])}, model.n_layers=1, budget.steps=2, evaluation.max_tokens=512]\n"
        "seeds: [0]\n"
        "arms:\n"
        "  mqa: {family: mqa, overrides: [attention=mqa], reference: true}\n"
        "  own: {family: own, overrides: [attention=shared]}\n"
        "contrasts: [[own, mqa]]\n"
        "match: [{quantity: params, to: mqa, vary: model.mlp_hidden, multiple_of: 8, tolerance: 0.05}]\n"
        'evaluate: [max_tokens=512, "extras=[]"]\n'
        "decode_contexts: [16]\n"
        "decode_batch_sizes: [1]\n"
    )
    run(forks, "tests/support/small_study.py", "configs", "study=own", "tracking=none", "device=cpu")
    assert list((project / "runs" / "own").glob("**/report.html")), sorted((project / "runs" / "own").rglob("*"))[:40]


# A constructor whose rotation ends in what is put in its place.
FAULTY = """
import train_model
from harness.entry.cli import run_script
from modeling.attention import shared
from modeling.refusal import Refusal

def rotation(**sizes):
    FAULT
shared.RotaryEmbedding = rotation
run_script(train_model.main, description=None)
"""


@pytest.mark.parametrize(
    ("fault", "status", "last"),
    [
        ('raise Refusal("width=32 is odd: take 31")', 2, "error: model=tiny attention=shared: width=32 is odd: take 31"),
        ('raise ValueError("width=32 is odd: take 31")', 1, "ValueError: width=32 is odd: take 31"),
        ("width, theta = sizes", 1, "ValueError: too many values to unpack (expected 2"),
    ],
    ids=["refusal", "ValueError", "unpacking"],
)
def test_what_a_class_refuses_is_a_sentence_and_its_bug_a_traceback(
    project: Path, forks: Forks, fault: str, status: int, last: str
) -> None:
    (project / "faulty.py").write_text(FAULTY.replace("FAULT", fault))
    done = forks.run("faulty.py", "attention=shared", "name=faulty", *setup(project))
    assert done.status == status and done.errors.splitlines()[-1].startswith(last), done.errors
    assert ('faulty.py", line' in done.errors) is ("Traceback (most recent call last)" in done.errors) is (status == 1)


def test_a_variant_of_ones_own_turns_no_test_of_the_documents_red(forks: Forks) -> None:
    """Of those of single variants its own, if it had one."""
    chosen = "readme_offers or sizes or option or [shared]"
    run(forks, "scripts/run_tests.py", "-n", "0", "-q", "tests/test_docs.py", "-k", chosen)


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        (
            "        dropout: float,\n",
            "        dropout: float,\n        **options: int,\n",
            r"SharedKeyValueAttention.__init__ takes \*\*options, in which a misspelt option would go unnoticed",
        ),
        ("rope_theta: float,", "rope_theta,", r"__init__ does not say the type of rope_theta: write rope_theta: int"),
        ("        norm_eps: float,\n", "", r"__init__ does not take norm_eps, which every model hands on"),
        ("rope_theta: float,", "rope_theta: complex,", r"rope_theta is of a type that no YAML can hold"),
        ("rope_theta: float,", "rope_theta: Angle,", r"a type cannot be looked up \(name 'Angle' is not defined\)"),
    ],
)
def test_a_constructor_that_yamls_cannot_be_checked_against_is_said(
    right: str, wrong: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = block(DOCUMENT, "add a variant: modeling/attention/shared.py")
    assert source.count(right) == 1
    module: dict[str, Any] = {"__name__": "modeling.attention.shared"}
    exec(source.replace(right, wrong), module)
    monkeypatch.setitem(MECHANISMS, "shared", module["SharedKeyValueAttention"])
    with pytest.raises(UserError, match=sentence):
        typed_attention(yaml.safe_load(block(DOCUMENT, "add a variant: configs/attention/shared.yaml")))


def test_a_yaml_whose_class_is_not_in_the_table_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MECHANISMS, "mla")
    with pytest.raises(UserError, match=r"attention\.mechanism=mla is unknown; choose from gdn, gqa"):
        load_train_config(["attention=mla"])
