"""A trained run converted to another attention: its layers taken through the stages of modeling/conversion, each measured.

    transmla   merge, rotate, drop RoPE, low rank (arXiv 2502.07864): GQA to MLA with one rotated key for all heads
    mha2mla    merge, partial RoPE by 2-norm, low rank of the weights (arXiv 2502.14837): a rotated key for each head
    exact      GQA written as MLA of the same cache (values take at most d_model dimensions); it can learn more than before
    gqa_mean   fewer key/value heads, each the mean of its neighbours (arXiv 2305.13245)

Windows stay, layer by layer: what a layer sees is no matter of its weights. Sinks and heads rotated in part are refused, since
no stage of these is exact for them, and so are layers that differ in more than their windows.

After each stage the model is compared with the run on validation tokens. What a stage promises to keep exactly is checked;
what is chosen, is chosen by validation loss, never on the test split.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.config.build import build_layer, build_model
from harness.config.checks import variant_schema
from harness.config.conversion import ConversionConfig, check_conversion
from harness.config.identity import origin_hash, setup_hash
from harness.config.run_config import load_run_config
from harness.config.schema import TrainConfig
from harness.data import PreparedData
from harness.data.prepared import TokenSplit
from harness.errors import UserError, as_user_error
from harness.evaluation.cache_size import measure_cache
from harness.evaluation.losses import TokenLosses
from harness.files.atomic import read_json
from harness.files.text import at_tokens, table_of
from harness.runs.corpus import validate, validation_split
from harness.runs.folder import finished
from harness.runs.from_weights import ORIGIN_FILE, make_run
from harness.runs.init_from import tokens_seen
from harness.runs.load import TrainedModel
from harness.training.checkpoint import save_model
from modeling.attention import EXECUTION, PATTERN
from modeling.attention.gqa import GroupedQueryAttention
from modeling.attention.quantisation import cache_format
from modeling.conversion.layers import GroupedLayer, LatentLayer, exact_state, grouped_layer, grouped_state, latent_state
from modeling.conversion.stages import (
    Moments,
    drop_rope,
    extend_rope,
    gqa_mean,
    input_moments,
    keep_strongest_pairs,
    latent_sizes,
    low_rank,
    merge,
    pools_equal_heads,
    rotate_heads,
    weight_moments,
)
from modeling.gpt import GPT
from modeling.refusal import Refusal

_SHORT = {"gqa_mean": "mean"}  # in the names of variants
# ||logits - logits before|| / ||logits before|| in float32, of stages that promise to change nothing.
EXACT_WITHIN = 1e-5
_WINDOW = 512  # tokens of a calibration or comparison window, at most
_COMPARED_TOKENS = 8_192
_HELD_OUT_TOKENS = 32_768

# What a layer is given as: the options of its class and its state dict.
LayerState = tuple[dict[str, int | str], dict[str, Tensor]]


@dataclass(frozen=True)
class Stage:
    """A stage of a conversion, against the run that it started from, on validation tokens."""

    stage: str
    exact: bool  # it promises to change nothing
    cache_context: int
    cache_bytes_per_token: int  # of that many
    largest_logit_error: float
    mean_logit_error: float
    relative_logit_error: float
    kl: float  # nats per token, of the run's next-token distribution from the stage's
    loss: float
    perplexity: float


@dataclass
class Converted:
    """A model and the way to it. stages: the run itself first."""

    config: TrainConfig
    model: GPT
    stages: list[Stage]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """Moments of every attention layer's input: on training tokens, and on validation tokens that nothing is fitted to."""

    layers: list[Moments]
    held_out: list[Moments]


def convert(trained: TrainedModel, data: PreparedData, options: ConversionConfig, *, device: torch.device) -> Converted:
    """The run's model with another attention, in float32, and what each stage on the way changed.

    Raises UserError where the run's attention does not convert so, where a size does not fit, and where a stage that
    promises to be exact changes the logits by more than EXACT_WITHIN.
    """
    check_conversion(options)
    config = trained.config
    _check_source(config)
    judge = Judge(trained, data, options, device=device)
    before = judge.report("the run", trained.model, exact=True)
    with as_user_error(f"{config.name} does not convert so: "):
        layers = [grouped_layer(copy.deepcopy(attention).double()) for attention in trained.model.attentions]
        calibration = None
        if options.kv_lora_rank is not None:
            tokens = max(options.calibration_tokens, 4 * options.kv_lora_rank)
            calibration = _calibrate(trained.model, data, tokens, device)
        stages, details = _PLANS[options.method](_Source(layers, calibration, options, judge))
    reports, model = [before], trained.model
    for stage, exact, states in stages:
        model = judge.build(states)
        reports.append(judge.report(stage, model, exact=exact))
    target = converted_config(config, stages[-1][2][0][0], options)
    return Converted(target, model, reports, details)


def _check_source(config: TrainConfig) -> None:
    if config.attention["mechanism"] != "gqa":
        raise UserError(f"attention={config.attention['name']} is no MHA, GQA or MQA, which is what conversions start from")
    for option, plain in (("sink_logits", False), ("rotary_fraction", 1.0)):
        if (value := config.attention[option]) != plain:
            raise UserError(f"attention={config.attention['name']} has {option}={value}, which no conversion carries over")
    for kind, own in (config.attention.get("kinds") or {}).items():
        if more := [option for option in own if option != "window"]:
            raise UserError(
                f"attention={config.attention['name']} has layers that differ in kinds.{kind}.{more[0]}, and conversions make "
                f"all of them alike but for their windows"
            )


class Judge:
    """Measures converted models against the run's own, on the same validation tokens."""

    def __init__(self, trained: TrainedModel, data: PreparedData, options: ConversionConfig, *, device: torch.device) -> None:
        self._trained, self._data, self._options, self._device = trained, data, options, device
        self._tokens_BT = _windows(validation_split(trained.config, data), _COMPARED_TOKENS, trained.model.max_seq_len).to(
            device
        )

    def build(self, states: Sequence[LayerState]) -> GPT:
        """The run's model with these layers in place of its attention."""
        config = converted_config(self._trained.config, states[0][0], self._options)
        return with_attention(self._trained.model, config, states).to(self._device)

    def loss(self, model: GPT) -> float:
        """Validation loss in nats per token, as training measures it."""
        losses = TokenLosses(model, precision=torch.float32, device=self._device)
        result = validate(losses, self._trained.config, self._data, self._trained.tokenizer, progress=True)
        return float(result.loss)

    @torch.inference_mode()
    def report(self, stage: str, model: GPT, *, exact: bool) -> Stage:
        """Raises UserError for an exact stage that is none, and for logits that are not finite or nothing but 0."""
        size, vocab = len(self._tokens_BT), self._trained.model.vocab_size
        largest = absolute = squared = reference = kl = 0.0
        for tokens_BT in self._tokens_BT.split(4):
            ours, theirs = (each(tokens_BT)[..., :vocab].double() for each in (model, self._trained.model))
            apart = (ours - theirs).abs()
            largest = max(largest, float(apart.max()))
            absolute += float(apart.mean(dim=-1).mean(dim=-1).sum())
            squared, reference = squared + float(apart.square().sum()), reference + float(theirs.square().sum())
            theirs_log = theirs.log_softmax(-1)
            divergence = (theirs_log.exp() * (theirs_log - ours.log_softmax(-1))).sum(-1)
            kl += float(divergence.mean(dim=-1).sum())
        relative = (squared / reference) ** 0.5 if reference else math.nan
        if not math.isfinite(relative):
            raise UserError(
                f"the logits of '{stage}' are not finite, or all of them 0: nothing was written; convert a run, or a "
                f"checkpoint of it, whose weights are sound"
            )
        if exact and not relative <= EXACT_WITHIN:
            raise UserError(
                f"the stage '{stage}' should change nothing and changes the logits by {relative:.1e} of their size, more than "
                f"{EXACT_WITHIN:.0e}: nothing was written; convert a run in float32 whose logits are finite"
            )
        loss = self.loss(model)
        cache = measure_cache(model, dtype=cache_format(self._trained.config.cache.dtype))
        return Stage(
            stage,
            exact,
            cache.context,
            cache.bytes_per_token,
            largest,
            absolute / size,
            relative,
            max(0.0, kl / size),
            loss,
            float(np.exp(loss)),
        )


def with_attention(source: GPT, config: TrainConfig, states: Sequence[LayerState]) -> GPT:
    """`source` with these layers in place of its attention, whose configuration this is; its weights' dtype is kept."""
    weights = {name: tensor for name, tensor in source.state_dict().items() if ".attention." not in name}
    for number, (_, state) in enumerate(states):
        weights |= {f"blocks.{number}.attention.{name}": tensor for name, tensor in state.items()}
    with torch.random.fork_rng(devices=[]):  # its initial values are replaced
        model = build_model(config, source.vocab_size).to(source.embedding.weight.dtype)
    model.load_state_dict(weights)
    return model.eval()


# (stage, whether it promises to be exact, the layers after it) of every stage, and what to tell of the conversion
Planned = tuple[list[tuple[str, bool, list[LayerState]]], dict[str, Any]]


@dataclass(frozen=True)
class _Source:
    """What the stages of a conversion start from."""

    layers: list[GroupedLayer]
    calibration: Calibration | None  # None: nothing is fitted
    options: ConversionConfig
    judge: Judge | None  # None: nothing is chosen by validation


def _transmla(source: _Source) -> Planned:
    layers, calibration, options, judge = source.layers, source.calibration, source.options, source.judge
    assert calibration is not None and options.qk_rope_head_dim is not None
    width, merged = options.qk_rope_head_dim, [merge(layer) for layer in layers]
    folds = [options.fold] if options.fold is not None else possible_folds(layers[0].k_GKD.shape[1], width)
    rotated = [rotate_heads(*pair) for pair in zip(merged, calibration.layers, strict=True)]
    tried: dict[int, float] = {}
    best: tuple[int, Planned, list[LatentLayer], list[LatentLayer]] | None = None
    for fold in folds:
        pairs = zip(merged, calibration.layers, strict=True)
        turned = rotated if fold == 1 else [rotate_heads(*pair, fold=fold) for pair in pairs]
        dropped = [drop_rope(layer, width) for layer in turned]
        compressed = _compressed(dropped, calibration, options, basis="activations", balance=True)
        if len(folds) > 1:
            assert judge is not None
            tried[fold] = judge.loss(judge.build(compressed[0][-1][2]))
        if best is None or tried[fold] == min(tried.values()):
            best = fold, compressed, turned, dropped
    assert best is not None
    fold, (compressed_stages, details), turned, dropped = best
    folded = [] if fold == 1 else [(f"neighbouring frequencies folded ({fold})", False, _states(turned))]
    return [
        ("merge heads", True, _states(merged)),
        ("rotate heads", True, _states(rotated)),
        *folded,
        (f"RoPE on {width} dimensions", False, _states(dropped)),
        *compressed_stages,
    ], details | {"fold": fold} | ({"validation_loss_by_fold": tried} if tried else {})


def possible_folds(head_dim: int, width: int) -> list[int]:
    """The folds that go with a rotated width: divisors of the head's frequencies, multiples of head_dim / width.

    Raises UserError where there is none.
    """
    collapse = head_dim // width if width and head_dim % width == 0 and width % 2 == 0 else 0
    folds = [fold for fold in range(1, head_dim // 2 + 1) if collapse and head_dim // 2 % fold == 0 == fold % collapse]
    if not folds:
        widths = [w for w in range(2, head_dim + 1, 2) if head_dim % w == 0 and head_dim // 2 % (head_dim // w) == 0]
        raise UserError(f"qk_rope_head_dim={width} does not go with heads of {head_dim}; choose one of {widths}")
    return folds


def _mha2mla(source: _Source) -> Planned:
    layers, calibration, options = source.layers, source.calibration, source.options
    assert calibration is not None and options.qk_rope_head_dim is not None
    heads, width = layers[0].k_GKD.shape[0], options.qk_rope_head_dim
    if width % (2 * heads):
        raise Refusal(
            f"qk_rope_head_dim={width} cannot be shared by {heads} key/value heads, each of which keeps an even width: "
            f"choose a multiple of {2 * heads}"
        )
    merged = [merge(layer) for layer in layers]
    partial = [keep_strongest_pairs(*pair, width // heads) for pair in zip(merged, calibration.layers, strict=True)]
    compressed, details = _compressed(partial, calibration, options, basis="weights", balance=False)
    return [
        ("merge heads", True, _states(merged)),
        (f"RoPE on {width // heads} dimensions a head", False, _states(partial)),
        *compressed,
    ], details


def _exact(source: _Source) -> Planned:
    mode = source.options.rope_mode
    if mode == "after_up":
        return [("latents rotated after their up-projection", True, [exact_state(layer) for layer in source.layers])], {}
    merged = [merge(layer) for layer in source.layers]
    stages = [("merge heads", True, _states(merged))]
    if mode == "extend":
        stages.append(("one table of frequencies", False, _states([extend_rope(layer) for layer in merged])))
    return stages, {"rope_mode": mode}


def _gqa_mean(source: _Source) -> Planned:
    layers, left = source.layers, source.options.n_kv_heads
    assert left is not None
    pooled = [gqa_mean(layer, left) for layer in layers]

    def states(of: Sequence[GroupedLayer]) -> list[LayerState]:
        return [({"n_kv_heads": len(layer.k_GKD)}, grouped_state(layer)) for layer in of]

    # The weights' way out of the modules and back is exact whatever the heads are; their mean, where they are equal.
    return [
        ("all heads, rewritten", True, states(layers)),
        (f"mean of heads ({left} left)", all(map(pools_equal_heads, layers, pooled)), states(pooled)),
    ], {}


_PLANS: dict[str, Callable[..., Planned]] = {"transmla": _transmla, "mha2mla": _mha2mla, "exact": _exact, "gqa_mean": _gqa_mean}


def _compressed(
    layers: Sequence[LatentLayer], calibration: Calibration, options: ConversionConfig, *, basis: str, balance: bool
) -> tuple[list[tuple[str, bool, list[LayerState]]], dict[str, Any]]:
    """The last stages, low rank and perhaps a norm, and the energy that the latents keep of what they join."""
    assert options.kv_lora_rank is not None
    basis = options.basis or basis
    balance = balance if options.balance is None else options.balance
    white = weight_moments(layers[0].kv_down_LD.shape[1])
    narrow, kept, unseen = [], [], []
    for layer, moments, held_out in zip(layers, calibration.layers, calibration.held_out, strict=True):
        compressed, energy, on_held_out = low_rank(
            layer,
            moments if basis == "activations" else white,
            options.kv_lora_rank,
            balance=balance,
            split=options.kv_latent == "split",
            held_out=held_out,
        )
        narrow.append(compressed)
        kept.append(energy)
        unseen.append(on_held_out)
    stages = [(f"low rank {options.kv_lora_rank} ({basis})", False, _states(narrow))]
    if options.latent_norm == "rms":
        gains = [latent_sizes(*pair) for pair in zip(narrow, calibration.layers, strict=True)]
        stages.append(("RMSNorm on the latent", False, _states(narrow, gains)))
    return stages, {
        "basis": basis,
        "balance": balance,
        "calibration_tokens": calibration.layers[0].tokens,
        "held_out_tokens": calibration.held_out[0].tokens,
        "energy_kept": kept,
        "energy_kept_held_out": unseen,
    }


def _states(layers: Sequence[LatentLayer], gains: Sequence[Sequence[float]] | None = None) -> list[LayerState]:
    """Options and weights of each layer; the options are the same: where one layer stores its frequencies, all do."""
    layers = _no_wider(layers)
    pairs = list(zip(layers, [None] * len(layers) if gains is None else gains, strict=True))
    states = [latent_state(layer, norm_gains=gain) for layer, gain in pairs]
    if len({options["rope_frequencies"] for options, _ in states}) > 1:
        states = [latent_state(layer, norm_gains=gain, stored=True) for layer, gain in pairs]
    return states


def _no_wider(layers: Sequence[LatentLayer]) -> list[LatentLayer]:
    """Latents wider than the layer's input, written in as many dimensions as that has: the same function.

    The class takes no wider ones, and no stage says more of x than x has dimensions.
    """
    d_model = layers[0].kv_down_LD.shape[1]
    if max(layers[0].parts) <= d_model:
        return list(layers)
    return [low_rank(layer, weight_moments(d_model), d_model, balance=False)[0] for layer in layers]


def converted_config(source: TrainConfig, shape: dict[str, int | str], options: ConversionConfig) -> TrainConfig:
    """The run's configuration with the attention that a stage made, whose shape this is. Execution fields are the defaults'."""
    attention = source.attention
    if "kv_lora_rank" in shape:
        plain = variant_schema("mla")[1] | {
            "mechanism": "mla",
            "q_lora_rank": None,
            "latent_norm_place": "latent",
            "latent_scale": False,
            "fused_down_projections": False,
            "sharing": "none",
            "sharing_layers": 1,
            "rope_theta": attention["rope_theta"],
            "dropout": attention["dropout"],
        }
    else:
        plain = dict(attention)
    method = _SHORT.get(options.method, options.method)
    seen = {option: attention[option] for option in ("window", *PATTERN) if option in attention}  # no weight depends on it
    made = plain | shape | seen | EXECUTION | {"name": f"{attention['name']}_{method}"}
    return dataclasses.replace(source, attention=made, init_from=None, init_setup=conversion_setup(source, options))


def conversion_setup(source: TrainConfig, options: ConversionConfig) -> str:
    """The init_setup of a run converted from one of `source`: the same for all its seeds."""
    return origin_hash([setup_hash(source), dataclasses.asdict(options)])


def converted_from(source: TrainConfig, options: ConversionConfig) -> TrainConfig:
    """The configuration that a conversion will give a run of `source`, before there are weights. Raises UserError as `convert`.

    One layer of random values goes through the stages.
    """
    check_conversion(options)
    _check_source(source)
    with torch.random.fork_rng(devices=[]):
        attention = build_layer(source)
    assert isinstance(attention, GroupedQueryAttention)
    way = options
    if options.method == "transmla" and options.fold is None:
        assert options.qk_rope_head_dim is not None
        way = dataclasses.replace(options, fold=possible_folds(attention.head_dim, options.qk_rope_head_dim)[0])
    white = [weight_moments(source.model.d_model)]
    with as_user_error(f"{source.attention['name']} does not convert so: "):
        layer = grouped_layer(attention.double())
        stages, _ = _PLANS[options.method](_Source([layer], Calibration(white, white), way, None))
    return converted_config(source, stages[-1][2][0][0], options)


def _calibrate(model: GPT, data: PreparedData, tokens: int, device: torch.device) -> Calibration:
    layers, held_out = (
        _moments(model, _windows(data.splits[split], count, model.max_seq_len), device)
        for split, count in (("train", tokens), ("validation", _HELD_OUT_TOKENS))
    )
    return Calibration(layers, held_out)


@torch.inference_mode()
def _moments(model: GPT, tokens_BT: Tensor, device: torch.device) -> list[Moments]:
    """Of every attention layer's input."""
    sums: list[Tensor | None] = [None] * len(model.attentions)

    def watch(number: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            moments = input_moments(inputs[0].flatten(0, 1))
            assert moments.tokens is not None
            before = sums[number]
            added = moments.second_EE * moments.tokens
            sums[number] = added if before is None else before + added

        return hook

    hooks = [attention.register_forward_pre_hook(watch(n)) for n, attention in enumerate(model.attentions)]
    try:
        for batch_BT in tokens_BT.split(8):
            model.hidden(batch_BT.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return [Moments(total.cpu() / tokens_BT.numel(), tokens_BT.numel()) for total in sums if total is not None]


def _windows(split: TokenSplit, tokens: int, max_seq_len: int) -> Tensor:
    """About so many tokens of a split, (B, T), in windows spread evenly over it; fewer of a shorter split."""
    width = min(_WINDOW, max_seq_len, split.n_tokens)
    count = min(-(-tokens // width), split.n_tokens // width)
    starts = np.linspace(0, split.n_tokens - width, count).astype(np.int64)
    return torch.from_numpy(split.tokens[starts[:, None] + np.arange(width)].astype(np.int64))


def write_converted(
    converted: Converted, source: Path, trained: TrainedModel, target: Path, *, method: str, data_dir: Path
) -> None:
    """The converted model as a run of its own, not yet scored."""
    config = dataclasses.replace(converted.config, name=target.name, runs_dir=str(target.parent), data_dir=str(data_dir))
    model = converted.model
    origin = {
        "kind": "conversion",
        "method": method,
        "source": str(source),
        "checkpoint": trained.checkpoint,
        "details": converted.details,
        "stages": [dataclasses.asdict(stage) for stage in converted.stages],
    }
    make_run(
        config,
        target,
        write_model=lambda path: save_model(model, path),
        model_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
        tokenizer_file=trained.tokenizer_file,
        text=None if trained.text is None else dataclasses.replace(trained.text, dtype=None),
        origin=origin,
        steps=trained.step,
    )


def tokens_behind(source: Path, trained: TrainedModel) -> int:
    """Tokens that a run's weights were trained on."""
    if finished(source):
        return tokens_seen(source)
    return trained.step * trained.config.batch_size * trained.config.model.max_seq_len


def already_converted(target: Path, source: Path, trained: TrainedModel, options: ConversionConfig) -> bool:
    """Whether `target` holds what this conversion gives and lacks its score alone: it was interrupted there.

    Raises UserError, with what to do, where it holds another conversion that was.
    """
    if finished(target) or not (target / ORIGIN_FILE).is_file():
        return False
    origin = read_json(target / ORIGIN_FILE)
    if origin.get("kind") != "conversion":
        return False
    same_source = Path(str(origin.get("source"))).resolve() == source.resolve()
    if same_source and origin.get("checkpoint") != trained.checkpoint:
        raise UserError(
            f"to={target} holds a conversion of {source} that was not scored, and that run's weights are others by now "
            f"({origin.get('checkpoint')} there, {trained.checkpoint} here): remove the folder, and convert anew"
        )
    if not same_source or load_run_config(target).init_setup != conversion_setup(trained.config, options):
        raise UserError(
            f"to={target} holds another conversion (method={origin.get('method')}, of {origin.get('source')}) that was not "
            f"scored: the command that made it scores it, or remove the folder first"
        )
    return True


def stage_rows(stages: Sequence[Stage]) -> list[list[str]]:
    """A table for people, its heading first."""
    return table_of(
        [
            {
                "stage": stage.stage,
                "exact": "yes" if stage.exact else "",
                f"cache bytes/token{at_tokens([stage.cache_context])}": f"{stage.cache_bytes_per_token:,}",
                "largest logit error": f"{stage.largest_logit_error:.2g}",
                "mean": f"{stage.mean_logit_error:.2g}",
                "relative": f"{stage.relative_logit_error:.1e}",
                "KL, nats/token": f"{stage.kl:.2e}",
                "validation perplexity": f"{stage.perplexity:,.3f}",
            }
            for stage in stages
        ]
    )


def detail_lines(details: Mapping[str, Any]) -> Iterator[str]:
    """What a conversion chose and what it kept, for people."""
    if "basis" in details:
        scaled = ", keys scaled to the values' energy first" if details["balance"] else ""
        yield f"low rank of {details['basis']}{scaled}; calibrated on {details['calibration_tokens']:,} training tokens"
        yield f"share of energy kept, by layer: {_numbers(details['energy_kept'])} of what was fitted"
        unseen = f"{details['held_out_tokens']:,} validation tokens"
        yield f"                                {_numbers(details['energy_kept_held_out'])} on {unseen}"
    if "validation_loss_by_fold" in details:
        tried = ", ".join(f"{fold}: {loss:.4f}" for fold, loss in details["validation_loss_by_fold"].items())
        yield f"fold {details['fold']}, chosen by validation loss in nats/token ({tried})"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
