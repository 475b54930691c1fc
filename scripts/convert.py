"""A trained run with another attention: python scripts/convert.py run=runs/NAME to=runs/NEW method=transmla ...

run                 a run of MHA, GQA or MQA with RoPE: its folder or name; without one, the newest finished run
to                  the new run's folder: absent, or empty
method              transmla    GQA to MLA: heads merged and rotated, RoPE kept on qk_rope_head_dim dimensions shared by all
                                heads, the rest compressed by principal components of activations
                    mha2mla     GQA to MLA: the strongest rotated pairs of each head kept, the rest by the weights' SVD
                    exact       GQA written as MLA of the same cache: nothing saved, nothing lost, more to learn
                    gqa_mean    fewer key/value heads, each the mean of its neighbours
kv_lora_rank        transmla, mha2mla: width of the latent
qk_rope_head_dim    transmla, mha2mla: rotated width that is cached, all heads together
n_kv_heads          gqa_mean: heads that are left
rope_mode           repeat      exact: repeat (each head's frequencies, absorbable), extend (one table over all dimensions: not
                                exact), after_up (latents expanded, then rotated)
kv_latent           joint       transmla, mha2mla: joint, or split (keys and values in halves of their own)
latent_norm         none        transmla, mha2mla: rms adds an RMSNorm to be trained in, as stock DeepSeek models have one
fold                null        transmla: neighbouring frequencies turned as one; null: what validation prefers
balance             null        keys scaled to the values' energy before the low rank; null: true for transmla, else false
basis               null        of the low rank: activations or weights; null: as the method's paper
calibration_tokens  65536       of the training split, at least four times kv_lora_rank
device              auto        runs_dir, data_dir: where runs and prepared data lie

Each stage is compared with the run on validation tokens: cache bytes, logit errors, KL divergence, perplexity. The result is
an ordinary run; go on with: python eval_model.py run=NEW, python train_model.py init_from=runs/NEW optimizer.lr=...
"""

# ruff: noqa: E402
from __future__ import annotations

import dataclasses
import json
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
class ConvertOptions:
    run: str | None = None
    to: str | None = None
    method: str | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    n_kv_heads: int | None = None
    rope_mode: str = "repeat"
    kv_latent: str = "joint"
    latent_norm: str = "none"
    fold: int | None = None
    balance: bool | None = None
    basis: str | None = None
    calibration_tokens: int = 65_536
    device: str = "auto"
    runs_dir: str = str(ROOT / "runs")
    data_dir: str | None = None


def main(arguments: list[str]) -> int:
    options = parse_options(ConvertOptions, arguments)
    for name, example in (("to", "to=runs/NEW"), ("method", "method=transmla")):
        if not getattr(options, name):
            raise UserError(f"{name}= is missing, as in {example}; --help lists all options")
    runs_dir = user_path(options.runs_dir)
    run = find_run(options.run, runs_dir) if options.run is not None else newest_run(runs_dir)
    assert options.to is not None and options.method is not None
    target = Path(options.to).expanduser().absolute()

    import torch

    from harness.comparison import aligned
    from harness.conversion import (
        ConversionConfig,
        check,
        convert,
        detail_lines,
        open_data,
        stage_rows,
        write_converted,
    )
    from harness.export import check_target
    from harness.made import check_name, score
    from harness.session import load_trained
    from harness.training.device import select_device
    from modeling.attention import EXECUTION

    conversion = ConversionConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(ConversionConfig)}
    )
    check(conversion)
    check_target(target)
    check_name(target)
    device = select_device(options.device)
    trained = load_trained(run, device=device, precision=torch.float32, execution=EXECUTION)
    data = open_data(trained, user_path(options.data_dir) if options.data_dir is not None else None)
    converted = convert(trained, data, conversion, device=device)
    tokens = write_converted(converted, run, trained, target, options.method)
    print("\n".join(aligned(list(stage_rows(converted.stages)), left=(0, 1))))
    print("\n".join(detail_lines(converted.details)))
    summary = score(target, tokens=tokens, device=device, precision=torch.float32)
    print(json.dumps({key: summary[key] for key in (
        "name", "attention", "parameters", "tokens", "loss", "perplexity", "bits_per_byte", "cache_bytes_per_token",
        "cache_elements_per_token_per_layer", "cache_ratio_to_mha",
    )}))  # fmt: skip
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__)
