"""A trained run as a Hugging Face model: python scripts/export.py run=runs/NAME to=DIR.

run             a run's folder or name; without one, the newest finished run
to              the folder to write: absent, or empty
kind            auto    of a stock class where one computes the same, else of our own
                stock   refused, naming what does not fit, where no stock class computes the same
                own     of our own class, whatever the variant
runs_dir        runs

MHA, GQA and MQA with rotation become LlamaForCausalLM (with attention.qk_norm Qwen3ForCausalLM, with
attention.projection_bias=qkv Qwen2ForCausalLM), MLA with RMSNorm latents and a decoupled rotation DeepseekV3ForCausalLM.
AutoModelForCausalLM.from_pretrained(DIR) and AutoTokenizer load them with no code of ours. Everything else (learned
positions, no rotation, relu2, ...) becomes a folder of our own class, which holds no code either and loads where this
project can be imported, after harness.huggingface.register(). What was written is loaded and compared with the run before
the folder appears.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import ROOT, enter_environment

enter_environment()

from harness.command_line import newest_run, parse_options, run_script
from harness.config import find_run, user_path
from harness.errors import UserError


@dataclass
class ExportOptions:
    run: str | None = None
    to: str | None = None
    kind: str = "auto"
    runs_dir: str = str(ROOT / "runs")


def main(arguments: list[str]) -> int:
    options = parse_options(ExportOptions, arguments)
    if not options.to:
        raise UserError("to= is missing: name the folder to write, as in to=exported/NAME")
    runs_dir = user_path(options.runs_dir)
    run = find_run(options.run, runs_dir) if options.run is not None else newest_run(runs_dir)

    from harness.export import export_run

    exported = export_run(run, Path(options.to).expanduser().absolute(), kind=options.kind)
    print(
        f"{exported.folder}: {exported.architecture}, {exported.parameters:,} parameters; loaded again, its logits differ "
        f"from the run's by {exported.difference:.1e} of their size"
    )
    if exported.own:
        print(
            f"The class is our own, {exported.why_own}: call harness.huggingface.register() before loading (see README.md)"
        )
    else:
        print("The class is a stock one of transformers: it loads with no code of ours")
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__)
