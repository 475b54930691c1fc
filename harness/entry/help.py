"""What --help prints: every option with its default, read from the definitions that also parse it.

A script's options are a dataclass whose fields are `Annotated[type, "what it means"]`. The fields of train_model.py and
eval_model.py are explained by the comments beside them, in the YAMLs and in the schema.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from harness.config.compose import SCHEMAS, check_config, default_options, given_by, options_of
from harness.config.identity import flat
from harness.config.places import CONFIGS, ROOT
from harness.config.typed import shown

_NAME_COLUMNS = 34
# `name: anything  # comment` of a YAML or of a dataclass.
_COMMENTED = re.compile(r"^( *)(\w+):.*?(?:\s#\s*(.*))?$")


def script_help(description: str | None, options: type | None, groups: Sequence[str]) -> str:
    """The description, the choices in `groups` (folders of configs/), and the options of a dataclass."""
    rows = list(_explained(options)) if options is not None else []
    named = {name.partition("=")[0] for name, _ in rows}
    choices = {group: ", ".join(options_of(group)) for group in groups}
    rows = [
        (name, f"{remark}: {choices[key]}" if (key := name.partition("=")[0]) in choices else remark) for name, remark in rows
    ]
    rows = [(f"{group}=", names) for group, names in choices.items() if group not in named] + rows
    return "\n\n".join(filter(None, [(description or "").strip(), _table(rows)]))


def config_help(description: str | None, config_name: str, overrides: Sequence[str]) -> str:
    """The same for a command that configs/<config_name>.yaml configures, its fields as these overrides make them.

    Raises UserError for overrides that the command itself would refuse.
    """
    config = check_config(config_name, overrides)
    chosen = {**default_options(config_name), **given_by(overrides)}
    remarks = dict(_schema_remarks(SCHEMAS[config_name]))
    for group in default_options(config_name):
        file = CONFIGS / group / f"{chosen[group]}.yaml"
        remarks |= _remarks(file.read_text(encoding="utf-8"), f"{group}.") if file.is_file() else {}
    remarks |= _remarks((CONFIGS / f"{config_name}.yaml").read_text(encoding="utf-8"))
    fields = [
        (f"{path}={_default(value)}", remarks.get(path, ""))
        for path, value in flat(dataclasses.asdict(config)).items()
        if "/" not in path  # a file of dataset.sha256
    ]
    groups = [(f"{group}=", ", ".join(options_of(group))) for group in default_options(config_name)]
    titles = ("Choices (group=option):", "Fields (key=value) and what they are now:")
    return "\n\n".join([(description or "").strip(), titles[0], _table(groups), titles[1], _table(fields)])


def _explained(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name=default, what it means) of every field; those of inner dataclasses by dotted names."""
    defaults = kind()
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _explained(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            notes = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
            remark = next((note for note in notes if isinstance(note, str)), "")  # the others are limits
            yield f"{prefix}{name}={_default(getattr(defaults, name))}", remark


def _default(value: Any) -> str:
    """As a user would type it, from the project's folder."""
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(ROOT):
        return str(Path(value).relative_to(ROOT))
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return shown(value)


def _schema_remarks(kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, comment) of the fields of a dataclass and of those inside it."""
    remarks: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        remarks |= _remarks(textwrap.dedent(inspect.getsource(base).partition("\n")[2]))
    for name, hint in typing.get_type_hints(kind).items():
        inner = [option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)]
        for option in inner:
            yield from _schema_remarks(option, f"{prefix}{name}.")
        choices = " | ".join(typing.get_args(hint)) if typing.get_origin(hint) is Literal else ""
        if not inner and (remark := ": ".join(filter(None, (choices, remarks.get(name))))):
            yield f"{prefix}{name}", remark


def _remarks(text: str, prefix: str = "") -> dict[str, str]:
    """The comments beside or above the fields of a YAML or of a dataclass's body, by dotted path."""
    found: dict[str, str] = {}
    groups: list[tuple[int, str]] = []
    above: list[str] = []  # lines of comment before a field stand in for one beside it
    for line in text.splitlines():
        if match := _COMMENTED.match(line):
            indent, name, remark = len(match[1]), match[2], match[3] or " ".join(above)
            groups = [(depth, group) for depth, group in groups if depth < indent] + [(indent, name)]
            if remark:
                found[prefix + ".".join(group for _, group in groups)] = remark
        above = [*above, line.strip(" #")] if line.lstrip().startswith("#") else []
    return found


def _table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns as wide as the terminal, remarks wrapped."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    names = min(max((len(name) for name, _ in rows), default=0) + 2, _NAME_COLUMNS)
    lines: list[str] = []
    for name, remark in rows:
        room = names if len(name) < names else len(name) + 2
        wrapped = textwrap.wrap(
            remark,
            max(width, room + 20),
            initial_indent=" " * room,
            subsequent_indent=" " * names,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [name + wrapped[0][len(name) :], *wrapped[1:]] if wrapped else [name]
    return "\n".join(lines)
