"""A trained run with another attention: python scripts/convert.py run=runs/NAME to=runs/NEW method=transmla ...

Methods:
transmla   GQA to MLA: heads merged and rotated, RoPE kept on qk_rope_head_dim dimensions shared by all heads, the rest
           compressed by principal components of activations
mha2mla    GQA to MLA: the strongest rotated pairs of each head kept, the rest by the weights' SVD
exact      GQA written as MLA of the same cache: nothing saved, nothing lost, more to learn
gqa_mean   fewer key/value heads, each the mean of its neighbours

Each stage is compared with the run on validation tokens: cache bytes, logit errors, KL divergence, perplexity. The result is
an ordinary run; go on with: python eval_model.py run=NEW, python train_model.py init_from=runs/NEW optimizer.lr=...
"""

# ruff: noqa: E402
from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

from harness.config.places import user_path
from harness.config.run_config import find_run
from harness.entry.cli import newest_run, parse_options, run_script
from harness.errors import UserError


@dataclass
class DatasetOptions:
    path: Annotated[str | None, "where the run's own text lies; null: its prepared data lies in data_dir"] = None


@dataclass
class ConvertOptions:
    run: Annotated[str | None, "a run of MHA, GQA or MQA with RoPE: its folder or name; null: the newest finished run"] = None
    to: Annotated[str | None, "the new run's folder: absent, or empty"] = None
    method: Annotated[str | None, "transmla, mha2mla, exact or gqa_mean"] = None
    kv_lora_rank: Annotated[int | None, "transmla, mha2mla: width of the latent"] = None
    qk_rope_head_dim: Annotated[int | None, "transmla, mha2mla: rotated width that is cached, all heads together"] = None
    n_kv_heads: Annotated[int | None, "gqa_mean: heads that are left"] = None
    rope_mode: Annotated[
        str,
        "exact: repeat (each head's frequencies, absorbable), extend (one table over all dimensions: not exact) or after_up "
        "(latents expanded, then rotated)",
    ] = "repeat"
    kv_latent: Annotated[str, "transmla, mha2mla: joint, or split (keys and values in halves of their own)"] = "joint"
    latent_norm: Annotated[
        str, "transmla, mha2mla: none, or rms: an RMSNorm to be trained in, as stock DeepSeek models have one"
    ] = "none"
    fold: Annotated[int | None, "transmla: neighbouring frequencies turned as one; null: what validation prefers"] = None
    balance: Annotated[
        bool | None, "keys scaled to the values' energy before the low rank; null: true for transmla, else false"
    ] = None
    basis: Annotated[str | None, "of the low rank: activations or weights; null: as the method's paper"] = None
    calibration_tokens: Annotated[int, "of the training split, at least four times kv_lora_rank"] = 65_536
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto"
    runs_dir: Annotated[str, "where runs are looked for"] = str(ROOT / "runs")
    data_dir: Annotated[str, "where prepared data lies"] = str(ROOT / "artifacts" / "data")
    dataset: DatasetOptions = field(default_factory=DatasetOptions)


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

    from harness.files.atomic import check_target
    from harness.files.text import aligned
    from harness.hf.classes import export_line
    from harness.runs.conversion import (
        ConversionConfig,
        already_converted,
        check,
        convert,
        converted_from,
        detail_lines,
        stage_rows,
        tokens_behind,
        write_converted,
    )
    from harness.runs.corpus import data_of
    from harness.runs.from_weights import ORIGIN_FILE, check_name, score
    from harness.runs.load import load_trained
    from harness.training.device import select_device
    from modeling.attention import EXECUTION

    conversion = ConversionConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(ConversionConfig)}
    )
    check(conversion)
    check_name(target)
    if not (target / ORIGIN_FILE).is_file():  # an earlier conversion is looked at below
        check_target(target)
    device = select_device(options.device)
    trained = load_trained(run, device=device, precision=torch.float32, execution=EXECUTION)
    tokens, data_dir = tokens_behind(run, trained), user_path(options.data_dir)
    there = already_converted(target, run, trained, conversion)
    if not there:
        check_target(target)
        print(export_line(converted_from(trained.config, conversion)), flush=True)
    path = None if options.dataset.path is None else str(user_path(options.dataset.path))
    data = data_of(run, trained.config, data_dir, path=path, tokenizer_file=trained.tokenizer_file, for_training=True)
    if there:
        print(f"already in {target}, where it was not scored")
    else:
        converted = convert(trained, data, conversion, device=device)
        write_converted(converted, run, trained, target, method=options.method, data_dir=data_dir)
        print("\n".join(aligned(list(stage_rows(converted.stages)), left=(0, 1))))
        print("\n".join(detail_lines(converted.details)))
    summary = score(target, data, tokens=tokens, device=device, precision=torch.float32)
    print(
        json.dumps(
            {
                key: summary[key]
                for key in (
                    "name",
                    "attention",
                    "parameters",
                    "tokens",
                    "loss",
                    "perplexity",
                    "bits_per_byte",
                    "cache_bytes_per_token",
                    "cache_elements_per_token_per_layer",
                    "cache_ratio_to_mha",
                )
            }
        )
    )
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__, options=ConvertOptions)
