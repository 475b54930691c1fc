"""A trained run as a Hugging Face model: python scripts/export.py run=runs/NAME to=DIR.

MHA, GQA and MQA with rotation become LlamaForCausalLM (with attention.qk_norm Qwen3ForCausalLM, with
attention.projection_bias=qkv and Qwen2's own kind of tokenizer Qwen2ForCausalLM; with windows in all layers
MistralForCausalLM, in some MinistralForCausalLM, or one of the two Qwens; with attention.rotary_fraction Phi3ForCausalLM; with
attention.gate=element and attention.qk_norm Qwen3_5ForCausalLM, beside layers of gated DeltaNet too), MLA with RMSNorm latents
and a decoupled rotation DeepseekV3ForCausalLM. AutoModelForCausalLM.from_pretrained(DIR) and AutoTokenizer load them with no
code of ours, in transformers 5 and, but for Ministral and Qwen3.5, 4.57. Everything else (learned positions, no rotation,
relu2, ...) becomes a folder of our own class, which holds no code either and loads where this project can be imported, after
harness.hf.classes.register(). What was written is loaded and compared with the run before the folder appears.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

from harness.entry.cli import chosen_run, parse_options, run_script
from harness.errors import UserError


@dataclass
class ExportOptions:
    run: Annotated[str | None, "a run's folder or name; null: the newest finished run"] = None
    to: Annotated[str | None, "the folder to write: absent, or empty"] = None
    kind: Annotated[
        str,
        "auto: of a stock class where one computes the same, else of our own; stock: refused, naming what does not fit, "
        "where none computes the same; own: of our own class, whatever the variant",
    ] = "auto"
    runs_dir: Annotated[str, "where runs are looked for"] = str(ROOT / "runs")


def main(arguments: list[str]) -> int:
    options = parse_options(ExportOptions, arguments)
    if not options.to:
        raise UserError("to= is missing: name the folder to write, as in to=exported/NAME")
    run = chosen_run(options.run, options.runs_dir)

    from harness.hf.export import export_run

    exported = export_run(run, Path(options.to).expanduser().absolute(), kind=options.kind)
    print(
        f"{exported.folder}: {exported.architecture}, {exported.parameters:,} parameters; loaded again, its logits differ "
        f"from the run's by {exported.difference:.1e} of their size"
    )
    if exported.own:
        print(f"The class is our own, {exported.why_own}: call harness.hf.classes.register() before loading (see README.md)")
    else:
        print("The class is a stock one of transformers: it loads with no code of ours")
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__, options=ExportOptions)
