"""What a configuration may say: types, choices, and combinations that can be refused without building anything."""

from __future__ import annotations

import inspect
import operator
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from harness.config.schema import EXTRAS, EvalConfig, TrainConfig
from harness.config.typed import did_you_mean, shown, typed, typed_fields
from harness.errors import UserError

RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._=,+-]*"
WIDEST = 2**18  # of any one width of a model: products of three of them stay within 64 bits
# Far above what is published, for configurations of runs and of imports alike; memory is counted in harness/config/build.py.
MOST = {
    "model.d_model": WIDEST,
    "model.n_heads": WIDEST,
    "model.head_dim": WIDEST,
    "model.mlp_hidden": WIDEST,
    "model.n_layers": 2048,
    "model.max_seq_len": 2**24,
    "model.vocab_size": 2**24,
    "batch_size": 2**24,
    "micro_batch_size": 2**24,
    "evaluation.batch_size": 2**24,
}


def variant_schema(mechanism: Any, path: str = "attention.mechanism") -> tuple[dict[str, Any], dict[str, Any]]:
    """(types, defaults) of a class's own options. Defaults stand in for options that older runs and YAMLs do not name."""
    from modeling.attention import MECHANISMS, MODEL_OWNED

    if not isinstance(mechanism, str) or mechanism not in MECHANISMS:
        named = shown(mechanism)
        raise UserError(f"{path}={named} is unknown; {did_you_mean(named, list(MECHANISMS))}")
    constructor = MECHANISMS[mechanism].__init__
    where = f"modeling.attention.MECHANISMS[{mechanism!r}], {constructor.__qualname__}"
    signature = dict(inspect.signature(constructor).parameters)
    parameters = {name: each for name, each in signature.items() if name not in ("self", *MODEL_OWNED)}
    for name, each in parameters.items():
        if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
            raise UserError(
                f"{where} takes {'**' if each.kind is each.VAR_KEYWORD else '*'}{name}, in which a misspelt option would go "
                f"unnoticed: name every option as a keyword with its type"
            )
        if each.annotation is each.empty:
            raise UserError(
                f"{where} does not say the type of {name}: write {name}: int (or float, bool, str), a YAML is checked by it"
            )
    lacking = [name for name in MODEL_OWNED if name not in signature]
    if lacking:
        raise UserError(f"{where} does not take {', '.join(lacking)}, which every model hands on: add it as a keyword")
    try:
        types_of = typing.get_type_hints(constructor)
    except NameError as error:
        raise UserError(f"{where}: a type cannot be looked up ({error}); import it outside TYPE_CHECKING") from None
    hints = {name: types_of[name] for name in parameters}
    for name, hint in hints.items():
        if not _can_be_checked(hint):
            raise UserError(
                f"{where}: {name} is of a type that no YAML can hold; take int, float, bool, str, a list or a dict of them, "
                f"or one of these | None"
            )
    return hints, {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _can_be_checked(kind: Any) -> bool:
    """Whether `typed` knows this type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        others = [option for option in typing.get_args(kind) if option is not type(None)]
        return len(others) == 1 and _can_be_checked(others[0])
    if (origin := typing.get_origin(kind)) in (list, dict):
        return len(typing.get_args(kind)) == (1 if origin is list else 2) and _can_be_checked(typing.get_args(kind)[-1])
    return kind in (int, float, bool, str, Any)


def typed_attention(attention: Any) -> dict[str, Any]:
    """A variant's options checked against the constructor of its class: the class is the schema.

    Those of each kind of layer against that of its own class, where layers differ.
    """
    from modeling.attention import EXECUTION
    from modeling.kernels.attend import BACKENDS
    from modeling.kernels.decode_kernels import KERNELS

    mechanism = attention.get("mechanism") if isinstance(attention, Mapping) else None
    hints, defaults = variant_schema(mechanism)
    # Absent where all layers are alike, so that such a variant is what it was before layers could differ.
    pattern = {"layers": list[str], "kinds": dict[str, dict[str, Any]]}
    hints |= {"name": str, "mechanism": str, "decode": str}
    hints |= {"backend": typing.Literal[BACKENDS], "kernel": typing.Literal[KERNELS]}  # type: ignore[valid-type]
    required = set(hints) - set(defaults) - set(EXECUTION)
    options = defaults | EXECUTION | typed_fields(hints | pattern, required, attention, "attention")
    for kind, own in options.get("kinds", {}).items():
        if not kind.isidentifier():  # names that other options are found by, as in attention.kinds.NAME.window=64
            raise UserError(f"attention.kinds has a kind named {kind!r}: name it by letters, digits and _, as local or full")
        options["kinds"][kind] = _typed_kind(options, own, f"attention.kinds.{kind}")
    return options


def _typed_kind(options: Mapping[str, Any], own: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a kind of layer says of itself. Raises UserError where its class lacks an option that is said, or needs another."""
    mechanism = own.get("mechanism", options["mechanism"])
    hints, defaults = variant_schema(mechanism, f"{path}.mechanism")
    said = typed_fields(hints | {"mechanism": str, "reads": str}, set(), own, path)
    for lacking in sorted(set(hints) - set(defaults) - set(options) - set(said)):
        raise UserError(f"{path}.{lacking} is missing, which mechanism={mechanism} needs; give it a value")
    return said


def layer_kinds(attention: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All options of the layers of each kind, name and mechanism included; of a variant whose layers are alike, its own."""
    from modeling.attention import kind_options

    if "layers" not in attention:
        return {attention["name"]: dict(attention)}
    kinds = {}
    for kind in dict.fromkeys(attention["layers"]):
        if kind in attention.get("kinds", {}):  # where it is not, building says so
            mechanism, options = kind_options(attention["mechanism"], attention_options(attention), kind)
            kinds[kind] = options | {"name": f"{attention['name']}.{kind}", "mechanism": mechanism}
    return kinds


def check_scale(attention: Mapping[str, Any]) -> None:
    """Raises UserError for a control of MLA under DeepSeek's YaRN, whose factor of all logits heads without a latent lack.

    Where all of a head is rotated and keys are as wide as values it is a stock model's, which means the same by the field.
    """
    for layer in layer_kinds(attention).values():
        scaling = layer.get("rope_scaling") or {}
        is_control = layer["mechanism"] == "gqa" and (
            layer["positions"] == "decoupled" or layer["head_dim"] != layer["v_head_dim"]
        )
        if is_control and scaling.get("mscale_all_dim"):
            raise UserError(
                f"attention={layer['name']}: rope_scaling.mscale_all_dim={scaling['mscale_all_dim']} is DeepSeek's and scales "
                f"all logits of latent attention alone, so that this control of it would have another softmax scale: leave "
                f"mscale and mscale_all_dim out, in all variants that you compare"
            )


def attention_options(attention: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a variant's configuration that its class takes."""
    return {key: value for key, value in attention.items() if key not in ("name", "mechanism")}


def train_config(container: Mapping[str, Any]) -> TrainConfig:
    """A resolved container as a checked TrainConfig: types, unknown keys, impossible combinations."""
    config: TrainConfig = typed(TrainConfig, container, "")
    config.attention = typed_attention(config.attention)
    _check_values(config)
    return config


def _check_values(config: TrainConfig) -> None:
    """Combinations that can be refused without building anything."""

    def at_most(path: str, value: int | None, most: int) -> None:
        if value is not None and value > most:
            raise UserError(f"{path}={value} is beyond anything that can be built; choose {most} or less")

    for path, most in MOST.items():
        at_most(path, operator.attrgetter(path)(config), most)
    kinds = layer_kinds(config.attention)
    for options in kinds.values():
        for key, value in options.items():
            if type(value) is int:
                at_most(f"attention.{key}", value, WIDEST)
        if (window := options.get("window") or 0) > config.model.max_seq_len:
            raise UserError(
                f"attention={options['name']}: window={window} is longer than the context, model.max_seq_len="
                f"{config.model.max_seq_len}: choose a shorter one, or null to see everything"
            )
    if config.micro_batch_size is not None and config.batch_size % config.micro_batch_size:
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} does not divide batch_size={config.batch_size}; choose a divisor"
        )
    if config.budget.tokens is not None and config.budget.steps is not None:
        raise UserError(
            f"budget.tokens={config.budget.tokens} and budget.steps={config.budget.steps} both set the length of the "
            f"run; give one"
        )
    rates = [("attention.dropout", options.get("dropout", 0.0)) for options in kinds.values()]
    for path, rate in (("model.dropout", config.model.dropout), *rates):
        if not 0 <= rate < 1:
            raise UserError(f"{path}={rate} must be at least 0 and below 1")
    if not config.model.causal:
        raise UserError(
            "model.causal=false cannot be trained to predict the next token, which every position would then see; "
            "build the GPT from modeling/ for other objectives"
        )
    if config.name != "auto" and not re.fullmatch(RUN_NAME, config.name):
        raise UserError(f"name={config.name} must be one plain folder name: letters, digits and . _ = , + - only")


def eval_config(container: Mapping[str, Any]) -> EvalConfig:
    """A resolved container as a checked EvalConfig."""
    config: EvalConfig = typed(EvalConfig, container, "")
    if config.extras == ["all"]:
        config.extras = list(EXTRAS)
    for extra in config.extras:
        if extra not in EXTRAS:
            raise UserError(f"extras={extra} is unknown; {did_you_mean(extra, EXTRAS)}")
    if config.cache.window is not None and config.cache.window < 1:
        raise UserError(f"cache.window={config.cache.window} sees nothing; choose 1 or more, or null for the whole context")
    if config.cache.sinks < 0 or (config.cache.sinks and config.cache.window is None):
        raise UserError(f"cache.sinks={config.cache.sinks} stay visible beside a window; choose 0 or more and set cache.window")
    return config
