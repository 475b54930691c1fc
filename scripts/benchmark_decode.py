"""What decoding costs, by variant, context and batch size: python scripts/benchmark_decode.py [key=value ...].

model.KEY and attention.KEY are as for train_model.py, for the variants that have the field.

Weights and caches are random, of a run too: speed does not depend on them. What the columns mean is said in
harness/decode/speed.py. Largest batch: of the model with all its layers (level=attention: their attention).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

from harness.config.compose import load_train_config, options_of
from harness.config.places import user_path
from harness.config.run_config import find_run, load_run_config
from harness.config.schema import Device, TrainConfig
from harness.config.typed import did_you_mean
from harness.entry.cli import parse_options, run_script, whole_numbers
from harness.errors import UserError, as_user_error
from harness.files.untrusted import Count, Positive
from modeling.cache_formats import FORMS, read_format

if TYPE_CHECKING:
    import torch

    from harness.decode.speed import DecodeTime
    from harness.decode.subjects import DecodePlan, DecodeSubject, Writer


def auto_or_format(name: str) -> None:
    """Raises Refusal for what is neither."""
    if name != "auto":
        read_format(name)


@dataclass
class DecodeCacheOptions:
    dtype: Annotated[str, auto_or_format, f"of the cache: {FORMS}; auto: as dtype"] = "auto"


@dataclass
class DecodeOptions:
    attention: Annotated[str, "variants, separated by commas, or all"] = "mha,gqa,mqa,mla"
    model: Annotated[str, "a YAML of configs/model"] = "tiny"
    run: Annotated[str | None, "a trained run's shape and vocabulary instead"] = None
    level: Annotated[
        Literal["model", "attention"], "model; or attention: the attention layers alone, without norms, MLP and head"
    ] = "model"
    layers: Annotated[Positive | None, "how many are built and timed; null: all, at level=attention 1"] = None
    vocab_size: Positive = 4096
    contexts: Annotated[str, "cached tokens, separated by commas"] = "256,1024,4096"
    batch_sizes: Annotated[str, "sequences, separated by commas"] = "1,8"
    queries: Annotated[str, "new tokens a call; above 1 for MLA in both paths, at the smallest batch size"] = "1"
    decode: Annotated[
        Literal["auto", "expand", "absorbed", "both"],
        "MLA's paths: auto, expand, absorbed; both: a row each, and where they change places",
    ] = "both"
    kernel: Annotated[
        str,
        "what computes one new token, separated by commas: a row each of the variants that have it, and a note of the others; "
        "auto: gluon or triton on CUDA where one can, else torch",
    ] = "auto"
    backend: Annotated[str, "the attention kernel"] = "auto"
    step: Annotated[
        Literal["auto", "eager", "compile", "graph"], "eager, compile or graph; auto: a CUDA graph on CUDA, eager elsewhere"
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], "of weights and arithmetic; auto: bfloat16 on CUDA, else float32"
    ] = "auto"
    cache: DecodeCacheOptions = field(default_factory=DecodeCacheOptions)
    steps: Annotated[Positive, "of a reading, fewer where they take longer than a second together"] = 16
    rounds: Annotated[Positive, "readings; a figure is the median over their steps with quartiles; variants take turns"] = 5
    prefill_tokens: Annotated[
        Count, "time to first token, and generation end to end, up to so many tokens of prompt in all"
    ] = 8192
    peers: Annotated[
        bool,
        "at level=model transformers' generate on the same weights, where it is installed; at level=attention torch's SDPA "
        "on a cache of MLA's expanded keys and values",
    ] = True
    memory_budget_gib: Annotated[float | None, "for the largest batch, and for what is measured; null: half of the memory"] = (
        None
    )
    device: Annotated[Device, "auto, cpu, cuda or mps"] = "auto"
    seed: Count = 0
    out: Annotated[str | None, "gets decode.json, decode.csv and decode.png; null: artifacts/decode"] = None
    runs_dir: Annotated[str, "where runs are looked for"] = str(ROOT / "runs")


LARGEST_DIFFERENCE = 1e-4  # of logits in float32, relative: above it a peer computes something else and is not timed


def main(arguments: list[str]) -> int:
    overrides = [word for word in arguments if word.startswith(("model.", "attention."))]
    options = parse_options(DecodeOptions, [word for word in arguments if word not in overrides])
    check(options, overrides)
    configs, vocab_size = configurations(options, overrides, arguments)

    import torch

    from harness.decode.speed import machine_name, measure, swept_bytes
    from harness.decode.subjects import plan_cells
    from harness.report import decode_speed as decode_report
    from harness.runs.provenance import commit
    from harness.training.device import keep_freed_memory, seed_everything
    from modeling.attention import with_most_paths
    from modeling.attention.quantisation import as_format

    plan = make_plan(options)
    keep_freed_memory(plan.device)  # or a step's temporaries are mapped and zeroed anew each time
    seed_everything(options.seed)
    notes: list[str] = []
    subjects = make_subjects(configs, vocab_size, options, plan, notes)
    results = measure(plan_cells(subjects, plan), plan)
    machine = machine_name(plan.device)
    heading = title(options, overrides, configs, plan, machine)
    limits = {
        subject.name: with_most_paths(subject.part.attentions).absorbs_up_to for subject in subjects if len(subject.paths) > 1
    }
    crossovers = decode_report.crossovers(results.figures, limits)
    print("\n".join([heading, *decode_report.speed_table(results), *map(decode_report.crossover_sentence, crossovers), *notes]))
    print(
        f"bandwidth: {results.bandwidth / 1e9:,.1f} GB/s, reading {swept_bytes(plan) / 2**20:,.0f} MiB in this run; "
        f"largest batch: within {plan.budget_bytes / 2**30:,.1f} GiB"
    )

    record = {
        "options": dataclasses.asdict(options),
        "overrides": overrides,
        "device": machine,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "cache_dtype": str(as_format(plan.cache_dtype)),
        "step": plan.step_used,
        "torch": torch.__version__,
        "commit": commit(),
        "vocab_size": vocab_size,
        "read_bandwidth": results.bandwidth,
        "budget_bytes": plan.budget_bytes,
        "figures": [dataclasses.asdict(figure) for figure in results.figures],
        "skipped": [dataclasses.asdict(each) for each in results.skipped],
        "crossovers": [dataclasses.asdict(each) for each in crossovers],
        "notes": notes,
    }
    out = user_path(options.out) if options.out is not None else ROOT / "artifacts" / "decode"
    write_files(out, record, results.figures, heading)
    said = {key: record[key] for key in ("device", "dtype", "cache_dtype", "step")}
    counts = {"rows": len(results.figures), "left_out": len(results.skipped)}
    print(json.dumps(said | counts | {"record": str(out / "decode.json")}))
    return 0


def write_files(out: Path, record: dict[str, Any], figures: list[DecodeTime], heading: str) -> None:
    """decode.json, decode.csv and, where anything was timed, decode.png."""
    from harness.files.atomic import write_json, write_text, written_together
    from harness.report import decode_speed as decode_report
    from harness.report.plots import save_png

    files = [str(out / f"decode.{suffix}") for suffix in ("json", "csv", *(["png"] if figures else []))]
    with written_together(
        out,
        record="decode.json",
        stale=["decode.png"],
        what=f"out={out}",
        remedy="make room or choose another folder with out=...; what lay there is as it was",
    ) as temporary:
        write_json(temporary / "decode.json", record | {"files": files})
        write_text(temporary / "decode.csv", decode_report.speed_csv(figures))
        if figures:
            picture = decode_report.picture(figures, title=heading)
            save_png(picture, temporary / "decode.png", columns=len(picture.panels) // 2)
    print(f"written: {', '.join(files)}", flush=True)


def check(options: DecodeOptions, overrides: list[str]) -> None:
    """Raises UserError for options that are impossible or do not go together."""
    from modeling.kernels.decode_kernels import EXPLICIT, KERNELS, OTHERS

    if options.memory_budget_gib is not None and options.memory_budget_gib <= 0:
        raise UserError(f"memory_budget_gib={options.memory_budget_gib:g} is too small; choose more than 0")
    for kernel in options.kernel.split(","):
        if kernel not in KERNELS:
            raise UserError(f"kernel={kernel} is unknown; {did_you_mean(kernel, KERNELS)}")
        if kernel in OTHERS | EXPLICIT and whole_numbers("queries", options.queries) != [1]:
            raise UserError(
                f"kernel={kernel} computes calls of one new token, not queries={options.queries}: take kernel=torch or "
                "queries=1"
            )
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals:
            raise UserError(f"{word} is not of the form key=value; write {word}=...")
        if key in ("attention.decode", "attention.kernel", "attention.backend"):
            raise UserError(f"{key} is an option of its own here; write {key.removeprefix('attention.')}=...")


def configurations(options: DecodeOptions, overrides: list[str], arguments: list[str]) -> tuple[list[TrainConfig], int]:
    """What to measure, and the vocabulary. Raises UserError for what does not exist or does not go together."""
    if options.run is not None:
        given = [word for word in arguments if word.partition("=")[0] in ("attention", "model", "vocab_size")]
        if given or overrides:
            raise UserError(f"{[*given, *overrides][0]} stands beside run=..., which is a whole model: leave one out")
        from harness.data import Tokenizer

        folder = find_run(options.run, user_path(options.runs_dir))
        config = load_run_config(folder)
        file = folder / "tokenizer.json" if config.tokenizer.name != "bytes" else None
        return [config], Tokenizer.load(file).vocab_size
    names = options_of("attention") if options.attention == "all" else options.attention.split(",")
    configs, used = [], set()
    for name in dict.fromkeys(names):
        choice = [f"attention={name}", f"model={options.model}", "name=decode"]
        fields = load_train_config(choice).attention
        known = [word for word in overrides if not word.startswith("attention.") or _has_field(fields, word)]
        used |= set(known)
        configs.append(load_train_config([*choice, *known]))
    for word in overrides:
        if word not in used:
            fields_of = [config.attention for config in configs]
            known = [f"attention.{key}" for fields in fields_of for key in fields]
            known += [f"attention.kinds.{kind}.{key}" for fields in fields_of for kind, own in _kinds(fields) for key in own]
            key = word.partition("=")[0]
            raise UserError(f"{key} is a field of none of {', '.join(names)}; {did_you_mean(key, sorted({*known}))}")
    return configs, options.vocab_size


def _has_field(fields: Mapping[str, Any], override: str) -> bool:
    """Whether a variant has what attention.KEY=VALUE is for; of attention.kinds.KIND.KEY, whether it has that kind."""
    first, *inside = override.partition("=")[0].removeprefix("attention.").split(".")
    return first in fields and (first != "kinds" or not inside or inside[0] in dict(_kinds(fields)))


def _kinds(fields: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each kind of layers, with the fields of its own; none where all layers are alike."""
    return list((fields.get("kinds") or {}).items())


def make_plan(options: DecodeOptions) -> DecodePlan:
    """Settings as harness/decode/subjects.py takes them. Raises UserError for what this machine cannot do."""
    import torch

    from harness.decode.subjects import DecodePlan
    from harness.training.device import memory_bytes, select_device
    from modeling.attention.quantisation import cache_format
    from modeling.kernels.decode_kernels import check_capture, check_kernel

    device = select_device(options.device)
    captured = options.step == "graph" or (options.step == "auto" and device.type == "cuda")
    for kernel in options.kernel.split(","):
        with as_user_error():
            if captured:
                check_capture(kernel)
            check_kernel(kernel, device)
    if options.step == "graph" and device.type != "cuda":
        raise UserError(f"step=graph needs a CUDA device, not {device.type}; take step=compile or step=eager")
    automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = automatic if options.dtype == "auto" else getattr(torch, options.dtype)
    gib = options.memory_budget_gib
    return DecodePlan(
        contexts=tuple(sorted(whole_numbers("contexts", options.contexts))),
        batch_sizes=tuple(sorted(whole_numbers("batch_sizes", options.batch_sizes))),
        queries=tuple(sorted(whole_numbers("queries", options.queries))),
        steps=options.steps,
        rounds=options.rounds,
        step=options.step,
        device=device,
        dtype=dtype,
        cache_dtype=dtype if options.cache.dtype == "auto" else cache_format(options.cache.dtype),
        budget_bytes=memory_bytes(device) // 2 if gib is None else int(gib * 2**30),
        prefill_tokens=options.prefill_tokens,
        generate=options.peers,
        seed=options.seed,
    )


def make_subjects(
    configs: list[TrainConfig], vocab_size: int, options: DecodeOptions, plan: DecodePlan, notes: list[str]
) -> list[DecodeSubject]:
    """Every variant, and the peer that shares its weights.

    A variant that cannot be computed as asked has no row, and a note says why. Raises UserError where none can, and where the
    weights do not fit the budget.
    """
    import torch

    from harness.config.build import layers_that_differ
    from harness.decode.subjects import DecodeSubject, ExpandedAttention, footprint, paths_of
    from harness.runs.load import pin_execution
    from modeling.attention import attends, with_most_paths
    from modeling.attention.layer_cache import check_values
    from modeling.attention.layers import AttentionLayers
    from modeling.attention.output import decode_kernel
    from modeling.attention.quantisation import as_format

    longest = plan.contexts[-1] + plan.room
    subjects = []
    left_out: dict[str, list[str]] = {}  # rows, by the reason
    for config, (whole, count) in zip(configs, shapes_of(configs, vocab_size, options, plan), strict=True):
        name = config.attention["name"]
        with torch.device(plan.device):
            part = build_part(config, vocab_size, options.level, count, longest).eval()
        if count < (kinds := layers_that_differ(config)) and "layers" in config.attention:
            notes.append(f"{name}: timed is {count} of its first {kinds} layers, which differ; layers={kinds} times all kinds")
        with as_user_error(f"attention={name}: "):
            check_values(part.attentions, plan.cache_dtype)
        choosing = with_most_paths(part.attentions)
        paths = paths_of(choosing, options.decode)
        if not paths:
            raise UserError(f"decode={options.decode} is not a path of attention={name}; take decode=auto")
        sizes = functools.partial(footprint, dtype=plan.dtype, cache_dtype=plan.cache_dtype)
        subject = DecodeSubject(name, part, paths, sizes(whole))
        if options.level == "model" and options.peers:
            subject.writer = transformers_writer(part, config, plan.dtype, notes)
        part.to(plan.dtype)
        absorbs = "absorbed" in choosing.decode_paths and paths != ("expand",)
        kernels = options.kernel.split(",")
        for kernel in kernels:
            decode = "expand" if paths == ("expand",) else "auto"
            execution = {"backend": options.backend, "decode": decode, "kernel": kernel}
            row, said = name if len(kernels) == 1 else f"{name}, {kernel}", []
            try:
                with torch.no_grad(), as_user_error():
                    pin_execution(part, execution, device=plan.device, precision=plan.dtype)
                    if absorbs:
                        kept = as_format(plan.cache_dtype)
                        by = choosing.kernel_for(kept.read_dtype(plan.dtype), plan.device)
                        said.append(f"{row}: one new token absorbed is computed by {by}")
                    used = {decode_kernel(layer, plan.dtype, plan.device) for layer in filter(attends, part.attentions)}
                    said += [f"{row}: one new token over keys and values is computed by {by}" for by in used - {"torch"}]
            except UserError as reason:
                left_out.setdefault(str(reason), []).append(row)
                continue
            notes += said
            subjects.append(dataclasses.replace(subject, name=row, kernel=kernel))
        if not subjects or subjects[-1].part is not part:
            continue
        if options.level == "attention" and options.peers and all(map(ExpandedAttention.fits, part.attentions)):
            padded = choosing.backend == "sdpa_flash" and plan.device.type == "cpu"
            peer, whole_peer = (
                AttentionLayers([ExpandedAttention(layer, pad_values=padded) for layer in each.attentions])
                for each in (part, whole)
            )
            label = f"{name}, expanded cache (SDPA)"
            subjects.append(DecodeSubject(label, peer, ("auto",), sizes(whole_peer), prefills=False))
    if not subjects:
        raise UserError(next(iter(left_out)))
    notes += [f"no row of {'; '.join(rows)}: {reason}" for reason, rows in left_out.items()]
    return subjects


def shapes_of(configs: list[TrainConfig], vocab_size: int, options: DecodeOptions, plan: DecodePlan) -> list[tuple[Any, int]]:
    """Of every variant the whole on the meta device, and how many of its layers are timed. Raises UserError as above."""
    from modeling.shapes import shapes_only

    longest = plan.contexts[-1] + plan.room
    shapes, numbers = [], 0
    for config in configs:
        count = options.layers or (config.model.n_layers if options.level == "model" else 1)
        with shapes_only():
            whole = build_part(config, vocab_size, options.level, config.model.n_layers, longest)
            timed = build_part(config, vocab_size, options.level, count, longest)
        shapes.append((whole, count))
        numbers += sum(parameter.numel() for parameter in timed.parameters())
    if (needed := numbers * plan.dtype.itemsize) > plan.budget_bytes:
        raise UserError(
            f"the weights of {len(configs)} variants take {needed / 2**20:,.1f} MiB, more than memory_budget_gib="
            f"{plan.budget_bytes / 2**30:.3g}: take fewer with layers=1, level=attention or attention=..., or raise it"
        )
    return shapes


def build_part(config: TrainConfig, vocab_size: int, level: str, n_layers: int, longest: int) -> Any:
    """The model or its attention, with so many layers and positions. Raises UserError for sizes that do not fit."""
    from harness.config.build import attentions_of, build_model
    from modeling.attention.layers import AttentionLayers

    if level == "model":
        return build_model(config, vocab_size, n_layers=n_layers, max_seq_len=longest)
    return AttentionLayers(attentions_of(config, n_layers, max_seq_len=longest))


def transformers_writer(model: Any, config: TrainConfig, dtype: torch.dtype, notes: list[str]) -> Writer | None:
    """transformers' generation with the weights of a float32 model, which is cast; None, with a note, where it cannot be."""
    from harness.decode.subjects import Writer
    from harness.hf import classes

    name = config.attention["name"]
    try:
        theirs = classes.as_transformers(model, config)
        error = classes.difference(model, theirs)
        if error > LARGEST_DIFFERENCE:
            raise UserError(f"its logits differ by {error:.1e} of their size, more than {LARGEST_DIFFERENCE:.0e}")
    except (ImportError, UserError) as reason:
        notes.append(f"no transformers beside {name}: {reason}")
        return None
    if model.embedding.weight.dtype != dtype:
        theirs = classes.as_transformers(model.to(dtype), config)
    return Writer(
        "transformers",
        functools.partial(classes.generate_with_theirs, theirs),
        functools.partial(classes.their_cache_bytes, theirs),
        sum(parameter.nbytes for parameter in theirs.parameters()),
    )


def title(options: DecodeOptions, overrides: list[str], configs: list[TrainConfig], plan: DecodePlan, machine: str) -> str:
    """What was measured, in a line."""
    import torch

    from modeling.attention.quantisation import as_format

    model = configs[0].model
    layers = options.layers or (model.n_layers if options.level == "model" else 1)
    part = "whole model" if options.level == "model" else "attention alone"
    weights = str(plan.dtype).removeprefix("torch.")
    what = " ".join([f"run {options.run}" if options.run is not None else model.name, *overrides])
    return (
        f"{what}, {part}, {layers} of {model.n_layers} layers; {weights}, cache {as_format(plan.cache_dtype)}, "
        f"{plan.step_used}; {machine}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    run_script(main, description=__doc__, options=DecodeOptions, groups=("attention", "model"))
