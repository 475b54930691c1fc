"""attention.kernel=triton in a whole model, in Triton's interpreter: the same text as by the torch kernel."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling.attention.contract import randomise
from modeling.generation import generate
from tests.support.variants import gpt_from

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "mla": ["attention=mla"],
    "mla_plain": ["attention=mla_plain"],
    "grouped, query rank": ["attention=mla", "attention.n_kv_heads=2", "attention.q_lora_rank=20"],
    "shared latent": ["attention=mla_shared_latent"],
}
PROMPTS = [[5, 17, 3], [60, 61, 62, 63, 64, 65, 66], [9]]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install -r requirements-kernels.txt",
)


def texts() -> dict[str, bool]:
    """For each variant, whether rows of unequal length write with triton what they write with torch."""
    same = {}
    for name, overrides in VARIANTS.items():
        model = randomise(gpt_from(overrides)).eval()
        written = []
        for kernel in ("torch", "triton"):
            model.set_execution(decode="absorbed", kernel=kernel)
            for prompts in (PROMPTS, [PROMPTS[1]]):  # a mask, and rows of one length
                tokens = torch.stack(list(generate(model, prompts, max_new_tokens=12, temperature=0, stop=99)))
                written.append(tokens.tolist())
        same[name] = written[:2] == written[2:]
    return same


@needs_triton
def test_the_triton_kernel_writes_what_the_torch_kernel_writes() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.kernels.test_in_a_model"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"TRITON_INTERPRET": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(VARIANTS, True)


def test_a_window_is_refused_by_the_triton_kernel() -> None:
    model = gpt_from(["attention=mla"]).eval()
    model.set_execution(decode="absorbed", kernel="triton")
    with pytest.raises(ValueError, match=r"reads caches without a window: take attention.kernel=torch"):
        list(generate(model, [[1, 2, 3]], max_new_tokens=3, window=4))


if __name__ == "__main__":
    print(json.dumps(texts()))
