"""Configuration at the door: Hydra composes the YAMLs, and plain typed values are handed out.

Together with harness/entry this is the only place that knows Hydra. It owns the one resolver (`derive`) and the names of runs.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import itertools
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.checks import check_scale, eval_config, train_config, variant_schema
from harness.config.identity import SEED_FIELDS, corpus_name, differences, identity, setup_hash
from harness.config.places import CONFIGS, ROOT, user_path
from harness.config.run_config import FREE_TEXT, find_run, load_run_config, run_folders
from harness.config.schema import MODEL_DEFAULTS, EvalConfig, TrainConfig
from harness.config.typed import did_you_mean, fields_below, shown, typed
from harness.errors import UserError, readable

_BYTES = "tokenizer=bytes"


# --- arithmetic in YAML ----------------------------------------------------------------------------------------------

_OPERATORS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def derive(expression: str, sizes: Mapping[str, int]) -> int:
    """An integer from the model's sizes: + - * // min max over d_model, n_layers, n_heads, head_dim and max_seq_len."""

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
    from omegaconf.errors import OmegaConfBaseException

    known = ("d_model", "n_layers", "n_heads", "head_dim", "max_seq_len")
    try:
        sizes = {key: typed(int, _root_.model[key], f"model.{key}") for key in known}
        return derive(str(expression), sizes)
    except (UserError, OmegaConfBaseException):
        raise
    except Exception as error:  # OmegaConf makes a sentence of whatever a resolver raises
        raise AssertionError(f"derive:'{expression}'") from error


def register_resolvers() -> None:
    """`${derive:'...'}` for widths and `${project:runs}` for paths below the project's folder."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("derive", _derive_resolver, replace=True)
    OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)


def _unknown_field(key: str, known: Collection[str], command: str) -> str:
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
        remedy = f"did you mean {' or '.join(near)}?" if near else f"{command} --help shows all that there are"
    return f"{key} is not a field of the configuration; {remedy}"


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


def refuse_dashes(
    arguments: Sequence[str], flags: Mapping[str, bool] = types.MappingProxyType({}), *, known: Collection[str] = ()
) -> None:
    """Raises UserError for `--key=value`: `flags` are the words with dashes that are known, True for those with a value.

    known: the options that there are, without dashes; none: whoever reads the rest knows them.
    """
    for argument, behind in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        if not flag.startswith("-") or (flag in flags and (not equals or flags[flag])):
            continue
        if not equals and behind and not behind.startswith("-") and "=" not in behind:
            value = behind
        key = flag.lstrip("-").replace("-", "_")
        if known and key not in known and key.partition(".")[0] not in known:
            raise UserError(f"{flag} is not an option here; {did_you_mean(key, list(known))}")
        raise UserError(f"{argument}: options are written without dashes; write {key}={value or 'value'}")


def given_by(overrides: Sequence[str]) -> dict[str, str]:
    """What overrides of the form key=value give, as it stands there: of one key, the last."""
    return dict(override.partition("=")[::2] for override in overrides)


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
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_resolvers()
    parsed = _read_overrides(config_name, overrides)
    defaults = default_options(config_name)
    groups = tuple(override.input_line for override in parsed if override.key_or_group in defaults)
    try:
        composed = _composed(config_name, groups)
        if "tokenizer" in defaults and _reads_bytes(OmegaConf.select(composed, "dataset.source"), groups):
            composed = _composed(config_name, (*groups, _BYTES))
        composed = copy.deepcopy(composed)
        for group, fields in (inherited or {}).items():
            OmegaConf.update(composed, group, _literal(fields), merge=False, force_add=True)
        _set_fields(composed, config_name, [override for override in parsed if override.key_or_group not in defaults])
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            if isinstance(cause, AssertionError):
                raise
            cause = cause.__cause__ or cause.__context__
        field = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise UserError(f"{field}: {reason}; write a value, or the path of a field" if field else reason) from None
    assert isinstance(container, dict)
    return _at_home(typing.cast("dict[str, Any]", container))


@functools.lru_cache(maxsize=256)
def _composed(config_name: str, groups: tuple[str, ...]) -> Any:
    """What Hydra makes of these choices of groups, to be copied: it takes 0.1 s, and a study asks for the same ones often."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose(config_name, list(groups))


def _read_overrides(config_name: str, overrides: Sequence[str]) -> list[Any]:
    """As Hydra parses them. Raises UserError for what is no override of a group or field here."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    defaults = default_options(config_name)
    refuse_dashes(overrides, known=[*defaults, *(field.name for field in dataclasses.fields(SCHEMAS[config_name]))])
    for argument in overrides:
        if argument.find("=") < 1 and not argument.startswith("~"):
            choices = {option: f"{group}={option}" for group in defaults for option in options_of(group)}
            remedy = "name a field and its value" if "=" in argument else f"write {argument}=value"
            remedy = f"did you mean {choices[argument]}?" if argument in choices else remedy
            raise UserError(f"{argument} is not of the form key=value; {remedy}")
    absent = [f"{group}=null" for group, option in defaults.items() if option is None]  # so anyway; Hydra refuses it
    parsed = _parsed(OverridesParser.create(), [quoted(argument) for argument in overrides if argument not in absent])
    for override in parsed:
        key = override.key_or_group
        if key in defaults and not override.is_sweep_override():
            _refuse_signs(override, "null" if defaults[key] is None else "none" if "none" in options_of(key) else "NAME")
        if override.is_sweep_override():
            raise UserError(f"{override.input_line} is a list of choices; add -m to run them all")
        if key.startswith("hydra."):
            raise UserError(f"{override.input_line}: Hydra's own settings are fixed here; leave it out")
        chosen = shown(override.value())
        if key in defaults and chosen not in options_of(key):
            raise UserError(f"{key}={chosen} does not exist; {did_you_mean(chosen, options_of(key))}")
    return parsed


def _set_fields(composed: Any, config_name: str, overrides: Sequence[Any]) -> None:
    """Single fields of what Hydra has composed. Raises UserError for one that does not exist."""
    from omegaconf import OmegaConf

    known: Any = OmegaConf.to_container(composed, resolve=False)
    written, optional = _paths(known), {path for path, _ in fields_below(SCHEMAS[config_name])}
    if mechanism := (attention := known.get("attention") or {}).get("mechanism"):
        from modeling.attention import EXECUTION

        optional |= {f"attention.{name}" for name in (*variant_schema(mechanism)[1], *EXECUTION, "layers", "kinds")}
        for kind, own in (attention.get("kinds") or {}).items():
            types_of, _ = variant_schema((own or {}).get("mechanism", mechanism))
            optional |= {f"attention.kinds.{kind}.{name}" for name in (*types_of, "mechanism", "reads")}
    for override in overrides:
        key = override.key_or_group
        if key in written and (CONFIGS / key).is_dir():
            raise UserError(
                f"{override.input_line}: {key} is the run's own here; only single fields such as "
                f"{key}.{next(iter(known[key]))} can be set"
            )
        if key not in written and (key not in optional or key.split(".")[0] not in written):
            fields = written | optional | set(default_options(config_name))
            raise UserError(_unknown_field(key, fields, f"python {config_name}_model.py"))
        _refuse_signs(override, "value")
        # Added where the YAML leaves a field at the schema's default; what has no place is refused where values are typed.
        OmegaConf.update(composed, key, override.value(), merge=True, force_add=True)


def _at_home(container: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the home folder for a tilde in front of a path: a shell leaves one behind key= as it is."""
    return {
        key: _at_home(value)
        if isinstance(value, Mapping)
        else os.path.expanduser(value)
        if key in ("runs_dir", "data_dir", "path") and isinstance(value, str)
        else value
        for key, value in container.items()
    }


def _literal(value: Any) -> Any:
    """The same for OmegaConf, which would resolve `${...}`: in the configuration of a run it is text like any other."""
    if isinstance(value, Mapping):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _refuse_signs(override: Any, instead: str) -> None:
    """Raises UserError for Hydra's +key=value, ++key=value, and ~key, in whose place `instead` is a value to write."""
    if override.is_add() or override.is_force_add() or override.is_delete():
        value = (override.input_line or "").partition("=")[2]
        raise UserError(
            f"{override.input_line}: fields are neither added nor deleted; write {override.key_or_group}={value or instead}"
        )


def _reads_bytes(source: str | None, overrides: Sequence[str]) -> bool:
    """Whether a corpus brings its tokenizer with it: each symbol of a synthetic one is a token, unless one is chosen."""
    return source == "synthetic" and "tokenizer" not in given_by(overrides)


def implied(config_name: str, overrides: Sequence[str]) -> list[str]:
    """The choices that `compose` adds to these overrides: for what Hydra composes itself (--cfg)."""
    container = compose(config_name, overrides)
    source = (container.get("dataset") or {}).get("source")
    return [_BYTES] if "tokenizer" in container and _reads_bytes(source, overrides) else []


def _parsed(parser: Any, arguments: Sequence[str]) -> list[Any]:
    """What Hydra makes of each argument. Raises UserError for what it cannot read."""
    from hydra.errors import HydraException

    overrides = []
    for argument in arguments:
        try:
            overrides += parser.parse_overrides([argument])  # parse_override forgets the loader, for glob(*)
        except HydraException as error:
            reason = str(error).removeprefix(f"Error parsing override '{argument}'").strip().splitlines()[0]
            raise UserError(
                f"{argument} cannot be read as key=value ({reason}); quote values that hold brackets, commas, spaces or '=' "
                f"like \"key='a, b'\""
            ) from None
    return overrides


def sweep_jobs(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of each job that -m makes of lists of choices. Raises UserError for what Hydra cannot read."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = _parsed(parser, list(map(quoted, arguments)))
    choices = {}
    for override in parsed:
        key, swept = override.get_key_element(), override.is_sweep_override()
        if swept and not override.is_discrete_sweep():
            raise UserError(f"{override.input_line} has no end of values: name some, as {key}=1,2")
        values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        choices[key] = [f"{key}={value}" for value in values]
    return [list(job) for job in itertools.product(*choices.values())]


def forced(config_name: str, argument: str) -> str:
    """The argument as Hydra's own command line takes it for a field that the YAML leaves at the schema's default."""
    key = argument.partition("=")[0]
    return argument if key in default_options(config_name) or key.startswith("hydra") else f"++{argument}"


def _paths(container: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Every dotted path, inner groups included."""
    found: set[str] = set()
    for key, value in container.items():
        found.add(f"{prefix}{key}")
        if isinstance(value, Mapping):
            found |= _paths(value, f"{prefix}{key}.")
    return found


def load_eval_config(overrides: Sequence[str]) -> EvalConfig:
    """configs/eval.yaml with these overrides, checked.

    dataset.path without a dataset says where the run's own corpus lies now.
    """
    given = given_by(overrides)
    moved = None if "dataset" in given else given.get("dataset.path")
    if moved is not None:
        overrides = [override for override in overrides if not override.startswith("dataset.path=")]
    config = eval_config(compose("eval", overrides))
    if moved is not None:
        config.corpus_at = _whole_path(moved.strip("'\""))
    if config.dataset is not None:
        config.dataset.path = _whole_path(config.dataset.path)
    return config


def check_config(config_name: str, overrides: Sequence[str]) -> TrainConfig | EvalConfig:
    """configs/<config_name>.yaml with these overrides. Raises the UserError that loading it would."""
    return train_config(compose("train", overrides)) if config_name == "train" else load_eval_config(overrides)


def load_train_config(overrides: Sequence[str], starts_from: TrainConfig | None = None) -> TrainConfig:
    """configs/train.yaml with these overrides, checked, its name worked out.

    starts_from: the configuration of a run whose weights this one will start from, where init_from cannot name it yet.
    """
    begun = _begun(overrides)
    if begun is not None:
        config = begun
    elif starts_from is not None:
        config = _initialised(overrides, starts_from)
    else:
        config = train_config(compose("train", overrides))
        check_scale(config.attention)
    # Whole paths: the run is found, continued and evaluated from any folder.
    config.dataset.path = _whole_path(config.dataset.path)
    if begun is None and (tokenizer := config.tokenizer.path) is not None:
        with readable(f"tokenizer.path={tokenizer}", "make it readable, or name another"):
            if Path(tokenizer).exists():  # else a name on the hub
                config.tokenizer.path = _whole_path(tokenizer)
    if config.name == "auto":
        config.name = default_name(config, overrides)
    return config


# What a run that starts from another one's weights has in common with it, but for what shapes no weight.
_INHERITED = ("model", "attention", "tokenizer")
_FREE_OF_SOURCE = (
    "model.name",
    "attention.name",
    "model.dropout",
    "attention.dropout",
    "model.max_seq_len",
    "model.init",
    "model.init_std",
    "model.zero_init_outputs",
    *(f"model.{name}" for name in MODEL_DEFAULTS),
    "tokenizer.path",
)


def _begun(overrides: Sequence[str]) -> TrainConfig | None:
    """The configuration of a run that starts from the one that init_from names: a path, or a run below runs_dir.

    Where that run is gone, a run that started from it brings what it inherited, and is continued by the same command.
    Raises UserError when there is neither.
    """
    given = given_by(overrides)
    text = given.get("init_from", "null").strip("'\"")
    if text in ("", "null"):
        return None
    runs_dir = Path(os.path.expanduser(given.get("runs_dir", ROOT / "runs")))
    try:
        source = find_run(text, runs_dir, "init_from").absolute()
    except UserError:
        gone = {str(place.absolute()) for place in (user_path(text, "init_from"), runs_dir / text)}
        for folder in run_folders(runs_dir):
            with contextlib.suppress(UserError):
                own = load_run_config(folder)
                if own.init_from not in gone:
                    continue
                config = _initialised(overrides, own)
                config = dataclasses.replace(config, init_from=own.init_from, init_setup=own.init_setup)
                if folder.name == (default_name(config, overrides) if config.name == "auto" else config.name):
                    return config
        raise
    return dataclasses.replace(_initialised(overrides, load_run_config(source)), init_from=str(source))


def _initialised(overrides: Sequence[str], theirs: TrainConfig) -> TrainConfig:
    """The configuration of a run that starts from the weights of `theirs`. Raises UserError where it has another shape.

    Its corpus is theirs unless the overrides choose a dataset.
    """
    whole, given = dataclasses.asdict(theirs), given_by(overrides)
    changed = [override for override in overrides if override.startswith("dataset.")]
    names_dataset = "dataset" in given
    inherited = {group: whole[group] for group in (*_INHERITED, *(() if names_dataset else ("dataset",)))}
    config = train_config(compose("train", overrides, inherited))
    chosen = [group for group in _INHERITED if group in given]
    found = differences(config, theirs, only=_INHERITED, apart_from=_FREE_OF_SOURCE)
    if chosen:  # a whole group was asked for, in whose place theirs has come
        found += differences(train_config(compose("train", overrides)), theirs, only=chosen, apart_from=_FREE_OF_SOURCE)
    if found:
        raise UserError(
            f"init_from={theirs.name} brings its own model, attention and tokenizer: {found[0]}; leave that out, or train from "
            f"scratch"
        )
    if names_dataset or not changed:
        return dataclasses.replace(config, init_setup=setup_hash(theirs), init_data=not names_dataset)
    if theirs.dataset.path is not None and "dataset.path" not in given:
        raise UserError(
            f"{changed[0]} makes another corpus of the text of {theirs.name}, and the path in a run's config.yaml "
            f"({theirs.dataset.path}) is not followed: name the text too (dataset.path=...)"
        )
    return dataclasses.replace(config, init_setup=setup_hash(theirs))


def _whole_path(path: str | None) -> str | None:
    return str(Path(os.path.expanduser(path)).absolute()) if path else path


def default_name(config: TrainConfig, overrides: Sequence[str]) -> str:
    """dataset-model-attention, then each override that changes what the run is, by field, then the seed.

    A field is called by the last part of its name where no other field has the same.
    """
    parts = [corpus_name(config.dataset), config.model.name, config.attention["name"]]
    pairs, defaults = given_by(overrides), default_options("train")
    chosen = {key: value for key, value in sorted(pairs.items()) if key in defaults}
    parts += [
        value
        for key, value in chosen.items()
        if key not in ("dataset", "model", "attention", "tracking", "parallel") and value != shown(defaults[key])
    ]
    plain = train_config(compose("train", [f"{key}={value}" for key, value in chosen.items()]))
    before, after = identity(plain), identity(config)
    said = (*SEED_FIELDS, "dataset.path")
    given = {key for key in pairs if key not in defaults}
    lasts = collections.Counter(path.split(".")[-1] for path in after)
    parts += [
        f"{path.split('.')[-1] if lasts[path.split('.')[-1]] == 1 else path}="
        f"{Path(value).name if path == 'init_from' else shown(value)}"
        for path, value in sorted(after.items())
        if any(path == key or path.startswith(f"{key}.") for key in given) and path not in said and before.get(path) != value
    ]
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", "-".join(parts))
    if len(name) > 80:  # file systems stop at 255 bytes, W&B's names at 128
        name = f"{name[:71]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    name += f"-seed{config.seed}"
    return name if config.data_seed == config.seed else f"{name}-data{config.data_seed}"


@functools.cache
def default_options(config_name: str) -> Mapping[str, str | None]:
    """The groups of configs/<config_name>.yaml and what its defaults list chooses for each."""
    import yaml

    entries = yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text(encoding="utf-8"))["defaults"]
    options = {
        group: option
        for entry in entries
        if isinstance(entry, dict)
        for group, option in entry.items()
        if not group.startswith("optional ")
    }
    return types.MappingProxyType(options)
