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

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

from harness.config.conversion import ConversionConfig, Method, check_conversion
from harness.config.places import user_path
from harness.config.schema import Device, Tracker
from harness.entry.cli import chosen_run, parse_options, run_script
from harness.errors import UserError


@dataclass
class RunTextOptions:
    path: Annotated[str | None, "where the run's own text lies; null: its prepared data lies in data_dir"] = None


@dataclass
class RunsOptions:
    run: Annotated[str | None, "a run of MHA, GQA or MQA with RoPE: its folder or name; null: the newest finished run"] = None
    to: Annotated[str | None, "the new run's folder: absent, or empty"] = None


@dataclass
class ConvertOptions(ConversionConfig, RunsOptions):
    method: Annotated[Method | None, "transmla, mha2mla, exact or gqa_mean"] = None  # type: ignore[assignment]
    tracking: Annotated[Tracker | None, "what the score is logged to: wandb, trackio or none; null: as the run"] = None
    device: Annotated[Device, "auto, cpu, cuda or mps"] = "auto"
    runs_dir: Annotated[str, "where runs are looked for"] = str(ROOT / "runs")
    data_dir: Annotated[str, "where prepared data lies"] = str(ROOT / "artifacts" / "data")
    dataset: RunTextOptions = field(default_factory=RunTextOptions)


def main(arguments: list[str]) -> int:
    options = parse_options(ConvertOptions, arguments)
    for name, example in (("to", "to=runs/NEW"), ("method", "method=transmla")):
        if not getattr(options, name):
            raise UserError(f"{name}= is missing, as in {example}; --help lists all options")
    run = chosen_run(options.run, options.runs_dir)
    assert options.to is not None
    method = ConversionConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(ConversionConfig)})
    check_conversion(method)

    import torch

    from harness.files.atomic import check_target
    from harness.files.text import aligned
    from harness.hf.classes import export_line
    from harness.runs import conversion
    from harness.runs.corpus import data_of
    from harness.runs.folder import short_line
    from harness.runs.from_weights import score, target_folder
    from harness.runs.load import load_trained
    from harness.tracking import check_tracking
    from harness.training.device import select_device
    from modeling.attention import EXECUTION

    target = target_folder(options.to)
    device = select_device(options.device)
    trained = load_trained(run, device=device, precision=torch.float32, execution=EXECUTION)
    tracking = dataclasses.replace(trained.config.tracking, name=options.tracking or trained.config.tracking.name)
    check_tracking(tracking)
    tokens, data_dir = conversion.tokens_behind(run, trained), user_path(options.data_dir)
    there = conversion.already_converted(target, run, trained, method)
    if not there:
        check_target(target)
        print(export_line(conversion.converted_from(trained.config, method)), flush=True)
    path = None if options.dataset.path is None else str(user_path(options.dataset.path))
    data = data_of(trained, data_dir, path=path, for_training=True)
    if there:
        print(f"already in {target}, where it was not scored")
    else:
        converted = conversion.convert(trained, data, method, device=device)
        conversion.write_converted(converted, run, trained, target, method=method.method, data_dir=data_dir)
        print("\n".join(aligned(conversion.stage_rows(converted.stages), left=(0, 1))))
        print("\n".join(conversion.detail_lines(converted.details)))
    summary = score(target, data, tracking=tracking, tokens=tokens, device=device, precision=torch.float32)
    print(short_line(summary, target / "summary.json"))
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__, options=ConvertOptions)
