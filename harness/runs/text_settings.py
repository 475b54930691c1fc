"""What a checkpoint of transformers says of text beside its vocabulary, kept with the run that it was imported as.

text.json   the token that tokenizer.json puts before a text, where writing stops, chat template, names of special tokens
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config.typed import typed
from harness.errors import UserError
from harness.files.untrusted import Count, Unreadable, read_object

TEXT_FILE = "text.json"
# What tokenizer_config.json says of text; the rest is about classes and files of the checkpoint.
_KEPT = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "padding_side",
    "truncation_side",
)


@dataclass(frozen=True)
class TheirText:
    """opening: the token before a text whose beginning is scored (bos, else eos), None where they name neither.

    stops: tokens at which writing ends; none: as they were not named. dtype: of their weights as they lie.
    """

    opening: Count | None = None
    stops: list[Count] = field(default_factory=list)
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    dtype: str | None = None

    def save(self, folder: Path) -> None:
        (folder / TEXT_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def load_text(run: Path) -> TheirText | None:
    """None for a run that was not imported. Raises UserError for a file that is not what an import wrote."""
    file = run / TEXT_FILE
    if not file.exists():
        return None
    found, known = _object(file), {each.name for each in dataclasses.fields(TheirText)}
    try:
        text: TheirText = typed(TheirText, {key: value for key, value in found.items() if key in known}, "")
    except UserError as error:
        raise UserError(f"{file} is not what import_hf.py wrote ({error}): import the checkpoint again") from None
    kept = {key: text.tokenizer_config[key] for key in _KEPT if key in text.tokenizer_config}
    return dataclasses.replace(text, tokenizer_config=kept)


def read_text(files: Mapping[str, Path], config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> TheirText:
    """From a checkpoint's files, by name, those that are there. config: its config.json; vocabulary: token -> id."""
    tokens = _object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    if "special_tokens_map.json" in files:
        tokens = _object(files["special_tokens_map.json"]) | tokens
    generation = _object(files["generation_config.json"]) if "generation_config.json" in files else {}
    template = tokens.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].read_text(encoding="utf-8", errors="replace")
    named = [_id(tokens.get(name), vocabulary) for name in ("bos_token", "eos_token")]
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    known = set(vocabulary.values())
    stops = [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int) and end in known]
    dtype = config.get("dtype") or config.get("torch_dtype")
    return TheirText(
        next((number for number in named if number is not None), None),
        stops or [number for number in named[1:] if number is not None],
        {key: _name(tokens[key]) for key in _KEPT if tokens.get(key) is not None},
        template if isinstance(template, str) else None,
        dtype if isinstance(dtype, str) else None,
    )


def _name(token: Any) -> Any:
    """The text of a token that is an object with its text as content (how it is cut, tokenizer.json says); else itself."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def _id(token: Any, vocabulary: Mapping[str, int]) -> int | None:
    name = _name(token)
    return vocabulary.get(name) if isinstance(name, str) else None


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, Unreadable) as error:
        raise UserError(f"{file} cannot be read ({error}): fetch it again") from None
