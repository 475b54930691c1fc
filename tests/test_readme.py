"""What the README tells its reader to do is done here, in a copy of the project."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.projects import copy_project

ROOT = Path(__file__).resolve().parents[1]


def block(marker: str) -> str:
    """The fenced block after <!-- marker -->."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no block marked {marker}"
    return found[1]


def run(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=project, capture_output=True, text=True)


def test_the_steps_that_add_a_variant_add_one_that_keeps_the_contract_and_trains(tmp_path: Path) -> None:
    project = tmp_path / "project"
    copy_project(project)
    for path in ("modeling/attention/shared.py", "configs/attention/shared.yaml"):
        (project / path).write_text(block(f"add a variant: {path}"), encoding="utf-8")
    table = project / "modeling" / "attention" / "__init__.py"
    import_line, entry = block("add a variant: MECHANISMS").splitlines()
    text = table.read_text(encoding="utf-8")
    last_import = "from modeling.attention.mla import MultiheadLatentAttention\n"
    last_entry = '    "mla": MultiheadLatentAttention,\n'
    assert last_import in text and last_entry in text
    text = text.replace(last_import, f"{last_import}{import_line}\n").replace(last_entry, f"{last_entry}{entry}\n")
    table.write_text(text, encoding="utf-8")

    checked = run(project, "scripts/check_attention.py", "attention=shared")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "16 of 16 hold" in checked.stdout

    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of a small corpus" for i in range(400)), encoding="utf-8")
    trained = run(
        project, "train_model.py", "attention=shared", "dataset=local", f"dataset.path={tmp_path / 'text.txt'}",
        "tokenizer=bytes", "budget.steps=2", "tracking=none", "device=cpu", "evaluation.max_tokens=512",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout + trained.stderr
    summary = json.loads(trained.stdout.splitlines()[-1])
    assert summary["attention"] == "shared" and summary["cache_elements_per_token_per_layer"] == 32

    found = run(project, "-m", "pytest", "-q", "tests/modeling/test_contract.py", "-k", "shared", "--co")
    assert "test_contract[output_has_the_inputs_shape_and_dtype-shared]" in found.stdout, found.stdout + found.stderr
