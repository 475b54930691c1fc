"""Check an attention variant against the contract: python scripts/check_attention.py attention=NAME [key=value ...].

The overrides are train_model.py's (attention, model, and their fields). A table says what holds; status 1 if one fails.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import enter_environment

enter_environment()

from harness.command_line import run_script
from harness.config import load_train_config


def main(arguments: list[str]) -> int:
    config = load_train_config(arguments)

    import torch

    from harness.build import build_layer, build_model
    from modeling.attention.contract import CHECKS

    with torch.device("meta"):
        build_model(config, vocab_size=64)  # sizes that do not fit are said in one sentence
    print(f"attention={config.attention['name']} ({config.attention['mechanism']}), {config.model.n_heads} heads, "
          f"d_model {config.model.d_model}")  # fmt: skip
    failures = 0
    for check in CHECKS:
        started = time.perf_counter()
        try:
            check(lambda: build_layer(config))
            verdict, remark = "pass", ""
        except AssertionError as error:
            verdict, remark = "FAIL", f"  {error}"
        except (RuntimeError, ValueError, TypeError) as error:  # the user's own class may fail in any way
            verdict, remark = "FAIL", f"  {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        failures += verdict == "FAIL"
        print(
            f"  {verdict}  {check.__name__.replace('_', ' '):<48}{time.perf_counter() - started:5.1f} s{remark}",
            flush=True,
        )
    print(f"{len(CHECKS) - failures} of {len(CHECKS)} hold")
    return 1 if failures else 0


if __name__ == "__main__":
    run_script(main, description=__doc__)
