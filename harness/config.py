"""Configuration at the door: Hydra composes the YAMLs, this module checks them and hands out plain typed values.

Together with the entry scripts this is the only place that knows Hydra. It owns the one resolver (`derive`), the names
of runs, and the split of a configuration into what a run is (its identity) and how it is computed.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.schema import EvalConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"

# How a run is computed is not what it is: these may differ between two commands that mean the same run.
EXECUTION_FIELDS = (
    "name", "runs_dir", "data_dir", "device", "compile", "deterministic", "overwrite", "micro_batch_size",
    "intervals", "evaluation.batch_size", "tracking", "attention.backend", "attention.decode",
    "attention.kernel", "model.activation_checkpointing", "dataset.path", "checkpoints", "parallel",
)  # fmt: skip
SEED_FIELDS = ("seed", "data_seed")
# Fields that came later and change nothing as long as they keep their defaults: the hash of a setup is what it was before.
LATER_FIELDS = {
    "on_nonfinite": "stop", "skip_limit": 10, "spikes.sigma": None, "spikes.window": 100, "init_setup": None,
    "model.vocab_size": None, "attention.projection_bias": "model", "attention.rope_scaling": None,
    "attention.rope_frequencies": "computed",
}  # fmt: skip
TRACKING = ("wandb", "trackio", "none")  # harness/tracking/
CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")  # modeling/attention/cache.py
EXTRAS = ("beyond", "repeats", "recall", "latents")  # harness/evaluation/extras.py

RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._=,+-]*"
_MOST_YAML, _MOST_DEPTH = 1 << 20, 20  # of a run's config.yaml: characters, groups within groups
_WIDEST = 2**18  # of any one width of a model: products of three of them stay within 64 bits
_BYTES = "tokenizer=bytes"

# Overrides whose values are free text: they are quoted for Hydra, so that commas, spaces, '=' and brackets need none.
FREE_TEXT = ("name", "prompt", "path", "init_from", "run", "runs", "to", "source", "out", "dataset.path", "tokenizer.path",
             "runs_dir", "data_dir", "tracking.notes")  # fmt: skip


# --- arithmetic in YAML ----------------------------------------------------------------------------------------------

_OPERATORS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def derive(expression: str, sizes: Mapping[str, int]) -> int:
    """An integer from the model's sizes: + - * // min max over d_model, n_layers, n_heads, head_dim. Nothing else."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Call) and node.args and not node.keywords and ast.unparse(node.func) in ("min", "max"):
            return {"min": min, "max": max}[ast.unparse(node.func)](value(argument) for argument in node.args)
        raise UserError(f"derive:'{expression}' may use {', '.join(sizes)}, integers, + - * // min max, nothing else")

    try:
        return value(ast.parse(expression, mode="eval"))
    except SyntaxError as error:
        raise UserError(f"derive:'{expression}' is no arithmetic expression: {error.msg}") from None
    except ZeroDivisionError:
        raise UserError(f"derive:'{expression}' divides by zero for {dict(sizes)}; change one of the two") from None


def _derive_resolver(expression: str, *, _root_: Any) -> int:
    sizes = {
        key: typed(int, _root_.model[key], f"model.{key}") for key in ("d_model", "n_layers", "n_heads", "head_dim")
    }
    return derive(str(expression), sizes)


def register_resolvers() -> None:
    """`${derive:'...'}` for widths and `${project:runs}` for paths below the project's folder."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("derive", _derive_resolver, replace=True)
    OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)


# --- plain containers to typed dataclasses ---------------------------------------------------------------------------


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """The remedy for a misspelt word: the nearest choice, or all of them where none is near."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(choices))}"


def _unknown_field(key: str, known: Collection[str]) -> str:
    """The sentence for a field that does not exist: its group's fields, or whatever comes near."""
    group, _, name = key.rpartition(".")
    if group in known:
        inside = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == group}
        near = difflib.get_close_matches(name, inside, n=1, cutoff=0.6)
        fields = f"{group} has {', '.join(sorted(inside))}" if inside else f"{group} is a single value"
        remedy = f"did you mean {inside[near[0]]}?" if near else fields
    else:
        same = sorted(path for path in known if path.endswith(f".{name}"))  # lr: optimizer.lr
        near = same or difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
        remedy = f"did you mean {' or '.join(near)}?" if near else "--cfg job shows all that there are"
    return f"{key} is not a field of the configuration; {remedy}"


def _shown(value: Any) -> str:
    """A value as a user would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return str(value)
    except ValueError:  # a whole number of thousands of digits, which Python does not print
        return "(a number of thousands of digits)"


_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text",
          list: "a list like [a, b]", dict: "a group of fields"}  # fmt: skip


def typed(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind` (a dataclass, int, float, bool, str, list[...], dict[str, ...], X | None), or a UserError."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
        return typed(kind, value, path)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        required = {
            f.name for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }  # fmt: skip
        return kind(**typed_fields(hints, required, value, path))  # type: ignore[operator]
    if origin is list:
        if isinstance(value, (list, tuple)):
            return [typed(typing.get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(k): typed(typing.get_args(kind)[1], item, f"{path}.{k}") for k, item in value.items()}
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _fits(value):
            return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool) and _fits(value):
            return value
        if isinstance(value, float) and value.is_integer() and _fits(int(value)):  # budget.tokens=2e6
            return int(value)
    elif kind is str:
        if isinstance(value, float) or (isinstance(value, int) and _fits(value)) or _is_text(value):
            return _shown(value)
        if isinstance(value, str):
            raise UserError(f"{path} is not UTF-8 (byte {_first_bad_byte(value)}); give it in that encoding")
    elif isinstance(value, kind):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 1000:
        raise UserError(f"{path}={value} is too large; choose a whole number below 2^63")
    raise UserError(f"{path}={_shown(value)} must be {_WORDS[origin or kind]}")


def _fits(number: float) -> bool:
    """Finite, and a whole number within 64 bits: a larger one is nothing that can be counted, and may not be printable."""
    return -(2**64) < number < 2**64 if isinstance(number, int) else math.isfinite(number)


def _first_bad_byte(text: str) -> int:
    """From 1: of text that _is_text refuses."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return len(text[: error.start].encode()) + 1
    raise AssertionError("every byte is good")


def _is_text(value: Any) -> bool:
    """Text that a file in UTF-8 can hold: half of a surrogate pair stands for a byte that was none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def typed_fields(hints: Mapping[str, Any], required: set[str], value: Any, path: str) -> dict[str, Any]:
    """The fields of a mapping, each typed; unknown and missing ones are a UserError."""
    if not isinstance(value, Mapping):
        raise UserError(f"{path or 'the configuration'}={_shown(value)} must be a group of fields: {', '.join(hints)}")
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            raise UserError(f"{prefix}{key} is not a field of the configuration; {did_you_mean(str(key), list(hints))}")
    for key in sorted(required - set(value)):
        raise UserError(f"{prefix}{key} is missing from the configuration; give it a value")
    return {key: typed(hints[key], item, f"{prefix}{key}") for key, item in value.items()}


def _variant_schema(mechanism: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(types, defaults) of a class's own options. Defaults stand in for options that older runs and YAMLs do not name."""
    from modeling.attention import MECHANISMS, MODEL_OWNED

    constructor = MECHANISMS[mechanism].__init__
    types_of = typing.get_type_hints(constructor)
    parameters = {
        name: parameter for name, parameter in inspect.signature(constructor).parameters.items()
        if name != "self" and name not in MODEL_OWNED
    }  # fmt: skip
    hints = {name: types_of[name] for name in parameters}
    return hints, {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def typed_attention(attention: Any) -> dict[str, Any]:
    """A variant's options checked against the constructor of its class: the class is the schema."""
    from modeling.attention import EXECUTION, MECHANISMS
    from modeling.kernels.attend import BACKENDS
    from modeling.kernels.latent_decode import KERNELS

    mechanism = attention.get("mechanism") if isinstance(attention, Mapping) else None
    if not isinstance(mechanism, str) or mechanism not in MECHANISMS:
        raise UserError(f"attention.mechanism={mechanism} is unknown; {did_you_mean(str(mechanism), list(MECHANISMS))}")
    hints, defaults = _variant_schema(mechanism)
    hints |= {"name": str, "mechanism": str}
    required = set(hints) - set(defaults)
    options = (
        defaults | EXECUTION | typed_fields(hints | dict.fromkeys(EXECUTION, str), required, attention, "attention")
    )
    for field, choices in (("backend", BACKENDS), ("kernel", KERNELS)):
        if options[field] not in choices:
            raise UserError(f"attention.{field}={options[field]} is unknown; {did_you_mean(options[field], choices)}")
    return options


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

    def one_of(path: str, value: str, *choices: str) -> None:
        if value not in choices:
            raise UserError(f"{path}={value} is unknown; {did_you_mean(value, choices)}")

    def at_least(path: str, value: float | None, least: float) -> None:
        if value is not None and value < least:
            raise UserError(f"{path}={value} is too small; choose {least} or more")

    def at_most(path: str, value: int | None, most: int) -> None:
        if value is not None and value > most:
            raise UserError(f"{path}={value} is beyond anything that can be built; choose {most} or less")

    one_of("device", config.device, "auto", "cpu", "cuda", "mps")
    one_of("precision", config.precision, "auto", "float32", "bfloat16")
    one_of("compile", config.compile, "auto", "on", "off")
    one_of("cache.dtype", config.cache.dtype, *CACHE_DTYPES)
    one_of("optimizer.name", config.optimizer.name, "adamw", "muon")
    one_of("schedule.name", config.schedule.name, "cosine", "wsd")
    one_of("tracking.name", config.tracking.name, *TRACKING)
    one_of("tokenizer.name", config.tokenizer.name, "bpe", "bytes", "pretrained")
    one_of("on_nonfinite", config.on_nonfinite, "stop", "skip")
    one_of("parallel.name", config.parallel.name, "ddp", "fsdp")
    for path, least in {
        "batch_size": 1, "micro_batch_size": 1, "model.d_model": 1, "model.n_layers": 1, "model.n_heads": 1,
        "model.head_dim": 1, "model.max_seq_len": 1, "model.mlp_hidden": 1, "budget.tokens": 1, "budget.steps": 1,
        "intervals.log": 1, "intervals.evaluate": 1, "intervals.checkpoint": 1, "evaluation.batch_size": 1,
        "checkpoints.keep": 1, "skip_limit": 1, "spikes.window": 2,
        "evaluation.max_tokens": 1, "model.norm_eps": 0, "model.init_std": 0, "seed": 0, "data_seed": 0,
    }.items():  # fmt: skip
        at_least(path, operator.attrgetter(path)(config), least)
    for path, most in {
        "model.d_model": _WIDEST, "model.n_heads": _WIDEST, "model.head_dim": _WIDEST, "model.mlp_hidden": _WIDEST,
        "model.n_layers": 4096, "model.max_seq_len": 2**26, "model.vocab_size": 2**32, "batch_size": 2**24,
        "micro_batch_size": 2**24, "evaluation.batch_size": 2**24,
    }.items():  # fmt: skip
        at_most(path, operator.attrgetter(path)(config), most)
    for key, value in config.attention.items():
        if type(value) is int:
            at_most(f"attention.{key}", value, _WIDEST)
    if config.spikes.sigma is not None and config.spikes.sigma <= 0:
        raise UserError(f"spikes.sigma={config.spikes.sigma} must be above 0, such as 6, or null to skip no spike")
    for path in SEED_FIELDS:
        if (seed := operator.attrgetter(path)(config)) >= 2**63:
            raise UserError(f"{path}={seed} is too large for torch's generator; choose a seed below 2^63")
    if config.micro_batch_size is not None and config.batch_size % config.micro_batch_size:
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} does not divide batch_size={config.batch_size}; "
            f"choose a divisor"
        )
    if config.budget.tokens is not None and config.budget.steps is not None:
        raise UserError(
            f"budget.tokens={config.budget.tokens} and budget.steps={config.budget.steps} both set the length of the "
            f"run; give one"
        )
    for path in ("model.dropout", "attention.dropout"):
        group, key = path.split(".")
        rate = config.attention.get(key, 0.0) if group == "attention" else config.model.dropout
        if not 0 <= rate < 1:
            raise UserError(f"{path}={rate} must be at least 0 and below 1")
    if not 0 < config.evaluation.stride_fraction <= 1:
        raise UserError(
            f"evaluation.stride_fraction={config.evaluation.stride_fraction} must be above 0 and at most 1 (a window)"
        )
    if not config.model.causal:
        raise UserError(
            "model.causal=false cannot be trained to predict the next token, which every position would then see; "
            "build the GPT from modeling/ for other objectives"
        )
    if config.name != "auto" and not re.fullmatch(RUN_NAME, config.name):
        raise UserError(f"name={config.name} must be one plain folder name: letters, digits and . _ = , + - only")


# --- identity and names ----------------------------------------------------------------------------------------------


def flat(container: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in container.items():
        path = f"{prefix}{key}"
        leaves.update(flat(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value})
    return leaves


def identity(config: TrainConfig) -> dict[str, Any]:
    """What makes two commands the same run: every field by dotted path, execution fields left out."""
    leaves = flat(dataclasses.asdict(config))
    # A local corpus is known by its place; any other dataset's content is pinned, wherever it lies.
    execution = [field for field in EXECUTION_FIELDS if field != "dataset.path" or config.dataset.source != "local"]
    if config.dataset.source != "synthetic":  # what such a corpus is made of says nothing of any other
        execution += [path for path in leaves if path.startswith("dataset.synthetic_")]
    return {
        path: value for path, value in leaves.items()
        if not any(path == field or path.startswith(f"{field}.") for field in execution)
    }  # fmt: skip


def setup_hash(config: TrainConfig) -> str:
    """Twelve hex digits of the identity without the seeds: runs that differ by seed alone share it.

    Of a run that another one's weights begin, that one's setup counts, not its place.
    """
    leaves = {
        path: value for path, value in identity(config).items()
        if path not in (*SEED_FIELDS, "init_from") and not (path in LATER_FIELDS and value == LATER_FIELDS[path])
    }  # fmt: skip
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:12]


def origin_hash(origin: Any) -> str:
    """Twelve hex digits of what made weights that no training of this run did (JSON-able): its `init_setup`."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]


def differences(
    mine: TrainConfig, theirs: TrainConfig, *, only: Sequence[str] | None = None, apart_from: Sequence[str] = ()
) -> list[str]:
    """Sentences naming each identity field in which two configurations differ; `only` groups of fields, if given."""
    a, b = identity(mine), identity(theirs)
    return [
        f"{path} is {b.get(path, 'absent')} there and {a.get(path, 'absent')} here"
        for path in sorted(a.keys() | b.keys())
        if a.get(path) != b.get(path) and path not in apart_from and (only is None or path.partition(".")[0] in only)
    ]  # fmt: skip


# --- composing -------------------------------------------------------------------------------------------------------

SCHEMAS: dict[str, type] = {"train": TrainConfig, "eval": EvalConfig}


def quoted(argument: str) -> str:
    """key=value with the value of a free-text key quoted for Hydra's grammar; everything else unchanged."""
    key, equals, value = argument.partition("=")
    if not equals or key not in FREE_TEXT or value == "null" or (value[:1] in "'\"" and value[-1:] == value[:1]):
        return argument
    # Backslashes stand for themselves there, except before a quote, an interpolation or the end.
    escaped = re.sub(r"(\\+)(?='|\$\{|$)", lambda backslashes: backslashes[1] * 2, value)
    escaped = escaped.replace("'", "\\'").replace("${", "\\${")
    return f"{key}='{escaped}'"


def options_of(group: str) -> list[str]:
    """The YAMLs of a config group, by name."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def compose(
    config_name: str, overrides: Sequence[str], inherited: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """configs/<config_name>.yaml with overrides applied and every interpolation resolved, as plain containers.

    inherited: groups that come from elsewhere, whole, before single fields are set. Raises UserError, in one sentence, for
    what Hydra would not accept.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_resolvers()
    defaults = _default_options(config_name)
    for argument in overrides:
        if argument.find("=") < 1 and not argument.startswith("~"):
            choices = {option: f"{group}={option}" for group in defaults for option in options_of(group)}
            remedy = f"did you mean {choices[argument]}?" if argument in choices else "name a field and its value"
            raise UserError(f"{argument} is not of the form key=value; {remedy}")
    absent = [f"{group}=null" for group, option in defaults.items() if option is None]  # so anyway; Hydra refuses it
    overrides = [quoted(argument) for argument in overrides if argument not in absent]
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise _unreadable(error) from None
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        groups = [o.input_line or "" for o in parsed if o.key_or_group in defaults]
        for override in parsed:
            key = override.key_or_group
            if override.is_add() or override.is_force_add() or override.is_delete():
                raise UserError(f"{override.input_line}: fields are neither added nor deleted; write {key}=value")
            if override.is_sweep_override():
                raise UserError(f"{override.input_line} is a list of choices; add -m to run them all")
            if key.startswith("hydra."):
                raise UserError(f"{override.input_line}: Hydra's own settings are fixed here; leave it out")
            chosen = _shown(override.value())
            if key in defaults and chosen not in options_of(key):
                raise UserError(f"{key}={chosen} does not exist; {did_you_mean(chosen, options_of(key))}")
        try:
            composed = hydra_compose(config_name, groups)
            if "tokenizer" in defaults and _reads_bytes(OmegaConf.select(composed, "dataset.source"), overrides):
                composed = hydra_compose(config_name, [*groups, _BYTES])
            for group, fields in (inherited or {}).items():
                OmegaConf.update(composed, group, dict(fields), merge=False, force_add=True)
            known: Any = OmegaConf.to_container(composed, resolve=False)
            written, optional = _paths(known), _schema_paths(SCHEMAS[config_name])
            if mechanism := (known.get("attention") or {}).get("mechanism"):
                optional |= {f"attention.{name}" for name in _variant_schema(mechanism)[1]}
            for override in parsed:
                key = override.key_or_group
                if key in defaults:
                    continue
                if key in written and (CONFIGS / key).is_dir():
                    raise UserError(f"{override.input_line}: {key} is the run's own here; only single fields such as "
                                    f"{key}.{next(iter(known[key]))} can be set")  # fmt: skip
                if key not in written and (key not in optional or key.split(".")[0] not in written):
                    raise UserError(_unknown_field(key, written | optional | set(defaults)))
                # Added where the YAML leaves the field at the schema's default.
                OmegaConf.update(composed, key, override.value(), merge=True, force_add=key not in written)
            container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, UserError):
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
            field = getattr(error, "full_key", None)
            reason = str(error).splitlines()[0]
            raise UserError(f"{field}: {reason}; write a value, or the path of a field" if field else reason) from None
    assert isinstance(container, dict)
    return typing.cast("dict[str, Any]", container)


def _reads_bytes(source: str | None, overrides: Sequence[str]) -> bool:
    """Whether a corpus brings its tokenizer with it: each symbol of a synthetic one is a token, unless one is chosen."""
    return source == "synthetic" and not any(override.startswith("tokenizer=") for override in overrides)


def implied(config_name: str, overrides: Sequence[str]) -> list[str]:
    """The choices that `compose` adds to these overrides: for what Hydra composes itself (--cfg)."""
    container = compose(config_name, overrides)
    source = (container.get("dataset") or {}).get("source")
    return [_BYTES] if "tokenizer" in container and _reads_bytes(source, overrides) else []


def _unreadable(error: Exception) -> UserError:
    return UserError(
        f"an argument cannot be read as key=value ({str(error).splitlines()[0]}); quote values that hold brackets, "
        f"commas or spaces like \"key='a, b'\""
    )


def sweep_jobs(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of each job that -m makes of lists of choices. Raises UserError for what Hydra cannot read."""
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # for glob(*)
        try:
            batches = BasicSweeper.split_arguments(parser.parse_overrides(list(map(quoted, arguments))), None)
        except HydraException as error:
            raise _unreadable(error) from None
    return [list(job) for batch in batches for job in batch]


def forced(config_name: str, argument: str) -> str:
    """The argument as Hydra's own command line takes it for a field that the YAML leaves at the schema's default."""
    key = argument.partition("=")[0]
    return argument if key in _default_options(config_name) or key.startswith("hydra") else f"++{argument}"


def _paths(container: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Every dotted path, inner groups included."""
    found: set[str] = set()
    for key, value in container.items():
        found.add(f"{prefix}{key}")
        if isinstance(value, Mapping):
            found |= _paths(value, f"{prefix}{key}.")
    return found


def _schema_paths(kind: Any, prefix: str = "") -> set[str]:
    """Every dotted path of a dataclass, whether its YAML mentions it or not."""
    found: set[str] = set()
    for name, hint in typing.get_type_hints(kind).items():
        found.add(f"{prefix}{name}")
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                found |= _schema_paths(option, f"{prefix}{name}.")
    return found


def load_eval_config(overrides: Sequence[str]) -> EvalConfig:
    """configs/eval.yaml with these overrides, checked."""
    config = eval_config(compose("eval", overrides))
    if config.dataset is not None:
        config.dataset.path = _whole_path(config.dataset.path)
    return config


def eval_config(container: Mapping[str, Any]) -> EvalConfig:
    """A resolved container as a checked EvalConfig."""
    config: EvalConfig = typed(EvalConfig, container, "")
    for path, value, choices in (
        ("split", config.split, ("train", "validation", "test")),
        ("device", config.device, ("auto", "cpu", "cuda", "mps")),
        ("precision", config.precision, ("auto", "float32", "bfloat16")),
        ("cache.dtype", config.cache.dtype, CACHE_DTYPES),
        ("tracking.name", config.tracking.name, TRACKING),
    ):
        if value not in choices:
            raise UserError(f"{path}={value} is unknown; {did_you_mean(value, choices)}")
    for extra in config.extras:
        if extra not in EXTRAS:
            raise UserError(f"extras={extra} is unknown; {did_you_mean(extra, EXTRAS)}")
    for path, least_one in (
        ("batch_size", config.batch_size), ("max_tokens", config.max_tokens),
        ("extras_max_tokens", config.extras_max_tokens),
    ):  # fmt: skip
        if least_one is not None and least_one < 1:
            raise UserError(f"{path}={least_one} is too small; choose 1 or more")
    if config.cache.window is not None and config.cache.window < 1:
        raise UserError(
            f"cache.window={config.cache.window} sees nothing; choose 1 or more, or null for the whole context"
        )
    if config.cache.sinks < 0 or (config.cache.sinks and config.cache.window is None):
        raise UserError(
            f"cache.sinks={config.cache.sinks} stay visible beside a window; choose 0 or more and set cache.window"
        )
    if not 0 < config.stride_fraction <= 1:
        raise UserError(f"stride_fraction={config.stride_fraction} must be above 0 and at most 1 (a window)")
    return config


def check_config(config_name: str, overrides: Sequence[str]) -> None:
    """Raises the UserError that loading configs/<config_name>.yaml with these overrides would."""
    {"train": train_config, "eval": eval_config}[config_name](compose(config_name, overrides))


def load_train_config(overrides: Sequence[str], starts_from: TrainConfig | None = None) -> TrainConfig:
    """configs/train.yaml with these overrides, checked, its name worked out.

    starts_from: the configuration of a run whose weights this one will start from, where init_from cannot name it yet.
    """
    source = _init_source(overrides)
    if source is not None:
        config = dataclasses.replace(_initialised(overrides, load_run_config(source)), init_from=str(source))
    elif starts_from is not None:
        config = _initialised(overrides, starts_from)
    else:
        config = train_config(compose("train", overrides))
    # Whole paths: the run is found, continued and evaluated from any folder.
    config.dataset.path = _whole_path(config.dataset.path)
    if (
        config.tokenizer.path is not None and Path(config.tokenizer.path).expanduser().exists()
    ):  # else a name on the hub
        config.tokenizer.path = _whole_path(config.tokenizer.path)
    if config.name == "auto":
        config.name = default_name(config, overrides)
    return config


# What a run that starts from another one's weights has in common with it, but for what shapes no weight.
_INHERITED = ("model", "attention", "tokenizer")
_FREE_OF_SOURCE = ("model.name", "attention.name", "model.dropout", "attention.dropout", "model.max_seq_len", "model.init",
                   "model.init_std", "model.zero_init_outputs", "model.default_tokens", "model.default_batch_size",
                   "model.default_lr", "tokenizer.path")  # fmt: skip


def _init_source(overrides: Sequence[str]) -> Path | None:
    """The folder that init_from names: a path, or a run below runs_dir. Raises UserError when it is no run."""
    given = dict(override.partition("=")[::2] for override in overrides)
    text = given.get("init_from", "null").strip("'\"")
    if text in ("", "null"):
        return None
    runs_dir = Path(given.get("runs_dir", ROOT / "runs")).expanduser()
    return find_run(text, runs_dir, "init_from").absolute()


def _initialised(overrides: Sequence[str], theirs: TrainConfig) -> TrainConfig:
    """The configuration of a run that starts from the weights of `theirs`. Raises UserError where it has another shape."""
    inherited = {group: typing.cast("dict[str, Any]", dataclasses.asdict(theirs)[group]) for group in _INHERITED}
    config = train_config(compose("train", overrides, inherited))
    chosen = [group for group in _INHERITED if any(override.startswith(f"{group}=") for override in overrides)]
    found = differences(config, theirs, only=_INHERITED, apart_from=_FREE_OF_SOURCE)
    if chosen:  # a whole group was asked for, in whose place theirs has come
        found += differences(train_config(compose("train", overrides)), theirs, only=chosen, apart_from=_FREE_OF_SOURCE)
    if found:
        raise UserError(
            f"init_from={theirs.name} brings its own model, attention and tokenizer: {found[0]}; leave that out, or train from "
            f"scratch"
        )
    return dataclasses.replace(config, init_setup=setup_hash(theirs))


def _whole_path(path: str | None) -> str | None:
    return str(Path(path).expanduser().absolute()) if path else path


def default_name(config: TrainConfig, overrides: Sequence[str]) -> str:
    """dataset-model-attention, then each override that changes what the run is, by field, then the seed.

    A field is called by the last part of its name where no other field has the same.
    """
    parts = [config.dataset.name, config.model.name, config.attention["name"]]
    if config.dataset.source == "local" and config.dataset.path:  # of two corpora with one name, each has its own
        digest = hashlib.sha256(config.dataset.path.encode()).hexdigest()[:6]
        parts[0] += f"_{Path(config.dataset.path.rstrip('/')).stem}_{digest}"
    pairs = dict(override.partition("=")[::2] for override in overrides)
    defaults = _default_options("train")
    chosen = {key: value for key, value in sorted(pairs.items()) if key in defaults}
    parts += [
        value for key, value in chosen.items()
        if key not in ("dataset", "model", "attention", "tracking", "parallel") and value != _shown(defaults[key])
    ]  # fmt: skip
    plain = train_config(compose("train", [f"{key}={value}" for key, value in chosen.items()]))
    before, after = identity(plain), identity(config)
    said = (*SEED_FIELDS, "dataset.path")
    given = {key for key in pairs if key not in defaults}
    lasts = collections.Counter(path.split(".")[-1] for path in after)
    parts += [
        f"{path.split('.')[-1] if lasts[path.split('.')[-1]] == 1 else path}="
        f"{Path(value).name if path == 'init_from' else _shown(value)}"
        for path, value in sorted(after.items())
        if any(path == key or path.startswith(f"{key}.") for key in given) and path not in said
        and before.get(path) != value
    ]  # fmt: skip
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", "-".join(parts))
    if len(name) > 80:  # file systems stop at 255 bytes, W&B's names at 128
        name = f"{name[:71]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    name += f"-seed{config.seed}"
    return name if config.data_seed == config.seed else f"{name}-data{config.data_seed}"


def _default_options(config_name: str) -> dict[str, str | None]:
    """The groups of configs/<config_name>.yaml and what its defaults list chooses for each."""
    import yaml

    entries = yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: option for entry in entries if isinstance(entry, dict)
            for group, option in entry.items() if not group.startswith("optional ")}  # fmt: skip


def user_path(text: str) -> Path:
    """A path as typed: from the current folder, else from the project's."""
    path = Path(text).expanduser()
    if path.is_absolute() or path.exists() or not (ROOT / path).exists():
        return path.absolute()
    return ROOT / path


def find_run(text: str, runs_dir: Path, field: str = "run") -> Path:
    """A run's folder from what was typed for `field`: a path, or the name of a run below runs_dir. Raises UserError."""
    for candidate in (user_path(text), runs_dir / text):
        if (candidate / "config.yaml").is_file():
            return candidate
    known = sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))
    hint = did_you_mean(Path(text).name, known) if known else "train one with python train_model.py"
    raise UserError(f"{field}={text} is no run (no config.yaml in it or in {runs_dir / text}); {hint}")


def load_run_config(run: Path) -> TrainConfig:
    """The configuration inside a run's folder. Raises UserError when there is none or it does not fit this version."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} holds no config.yaml, so it is not a run; name a folder that train_model.py wrote")
    try:
        text = path.read_bytes().decode("utf-8")
        _check_yaml(text)
        # Nothing is resolved: in a run's configuration `${...}` is text like any other.
        container = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read: {reason}; restore it, or train the run anew") from None
    try:
        return train_config(typing.cast("dict[str, Any]", container))
    except UserError as error:
        raise UserError(f"{path} is not a configuration of this version: {error}") from None


def _check_yaml(text: str) -> None:
    """Raises ValueError for what no run's configuration holds and a few bytes of which cost all memory, or all stack."""
    import yaml

    if len(text) > _MOST_YAML:
        raise ValueError(f"{len(text):,} characters are more than any run's configuration has")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(event, yaml.NodeEvent) and (event.anchor is not None or getattr(event, "tag", None) is not None):
            raise ValueError("it has an anchor, an alias or a tag")


def save_run_config(config: TrainConfig, run: Path) -> None:
    """Write <run>/config.yaml, whole or not at all."""
    from omegaconf import OmegaConf

    aside = run / "config.yaml.tmp"
    aside.unlink(missing_ok=True)  # in a run from elsewhere it may be a link that leads out of it
    aside.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))), encoding="utf-8")
    aside.replace(run / "config.yaml")
