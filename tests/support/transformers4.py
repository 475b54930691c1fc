"""What transformers 4.57 makes of a folder: it runs in a process of its own, from a folder that holds it.

pip install --target artifacts/transformers4 --no-deps -r requirements-transformers4.txt
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

from harness.config.places import ROOT

FOLDER = Path(os.environ.get("TRANSFORMERS4", ROOT / "artifacts" / "transformers4"))

needed = pytest.mark.skipif(
    not (FOLDER / "transformers").is_dir(),
    reason="transformers 4 is not there: pip install --target artifacts/transformers4 --no-deps -r "
    "requirements-transformers4.txt",
)

_PROGRAM = """
import json, sys
import safetensors.torch, torch, transformers

assert transformers.__version__.startswith("4.57"), transformers.__version__
question = json.load(open(sys.argv[1]))
prompt_BT = torch.tensor(question["prompt_BT"])
logits, answers = {}, []
for number, folder in enumerate(question["folders"]):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    with torch.inference_mode():
        logits[str(number)] = model.eval()(prompt_BT).logits
    answer = {"class": type(model).__name__, "dtype": str(model.dtype)}
    if question["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        answer["tokens"] = [tokenizer(text)["input_ids"] for text in question["texts"]]
        answer["decoded"] = [tokenizer.decode(tokens) for tokens in answer["tokens"]]
        inputs = tokenizer(question["texts"][0], return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer["written"] = tokenizer.decode(written[0], skip_special_tokens=True)
    answers.append(answer)
safetensors.torch.save_file(logits, sys.argv[2])
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    """Of one folder. tokens, decoded: of each text; written: the first text and eight greedy tokens more."""

    architecture: str
    dtype: str
    logits_BTC: torch.Tensor
    tokens: list[list[int]]
    decoded: list[str]
    written: str


def answers(folders: Sequence[Path], prompt_BT: torch.Tensor, place: Path, *, texts: Sequence[str] = ()) -> list[Answer]:
    """place: an existing folder for what goes between the two processes."""
    question = {"folders": [str(folder) for folder in folders], "prompt_BT": prompt_BT.tolist(), "texts": list(texts)}
    asked, logits = place / "question.json", place / "logits.safetensors"
    asked.write_text(json.dumps(question))
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _PROGRAM, str(asked), str(logits)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    tensors = safetensors.torch.load_file(logits)
    return [
        Answer(
            answer["class"],
            answer["dtype"],
            tensors[str(number)],
            answer.get("tokens", []),
            answer.get("decoded", []),
            answer.get("written", ""),
        )
        for number, answer in enumerate(found)
    ]
