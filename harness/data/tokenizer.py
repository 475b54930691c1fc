"""Text to tokens and back: a byte-level BPE trained here, plain bytes, or any pretrained tokenizer.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError, in_a_line, readable
from harness.files.hashes import file_sha256, value_sha256
from harness.files.untrusted import Unreadable, is_count, parse_object

END_OF_TEXT = "<|endoftext|>"
# How pretrained tokenizers call it, in the order of preference.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]", "[SEP]")
_ANOTHER = "take another tokenizer.json"
_BYTES = 256  # plain bytes: ids below are bytes, this one ends a document
_MOST_BYTES = 1 << 28  # the largest published ones have a tenth
_MOST_GAPS = 2**20  # ids without a token
# What a normalizer, pre-tokenizer or decoder may be: steps, characters of its patterns, and how far a text may grow in it.
_MOST_STEPS, _MOST_PATTERNS, _MOST_GROWTH, _MOST_TEXT = 1_000, 65_536, 32, 2**24
_PIECE = 32_768  # characters in which a document is encoded where the cut cannot be seen in the tokens
_LONG_PIECE = 8_388_608  # likewise where it can: one cut in eight million characters, so that memory stays bounded


class Tokenizer:
    """Made by `plain_bytes`, `load` or `train_bpe`.

    vocab_size: ids are below it. end_of_text: the id that follows each document. sha256: of all that shapes the
    tokens. keeps_text: no two texts have the same tokens, as with plain bytes and most byte-level BPEs. Special
    tokens in a text are encoded as the characters that they are, never as the special token. What a tokenizer draws
    at random (BPE dropout) is switched off: a text has one encoding.

    A run from elsewhere may have been made to see texts otherwise (`speak_as`). begins: tokens before each prompt.
    opening: the token before a text whose beginning is scored. stops: where writing ends.
    """

    def __init__(self, backend: Any | None) -> None:
        """`backend`: a `tokenizers.Tokenizer`; None means plain bytes."""
        self._backend = backend
        self.vocab_size, self.end_of_text = _BYTES + 1, _BYTES
        self.sha256 = hashlib.sha256(b"bytes").hexdigest()
        self.begins: tuple[int, ...] = ()
        self.opening = self.end_of_text
        self.stops: tuple[int, ...] = (self.end_of_text,)
        self._special = False
        self._piece = _PIECE
        self.keeps_text = True
        if backend is None:
            return
        if getattr(backend.model, "dropout", None):  # of a BPE: merges left out at random, other tokens at every call
            backend.model.dropout = None
        backend.no_truncation()
        backend.no_padding()
        names = [name for name in _END_OF_TEXT_NAMES if backend.token_to_id(name) is not None]
        if not names:
            backend.add_special_tokens([END_OF_TEXT])
        backend.encode_special_tokens = True
        self.end_of_text = backend.token_to_id(names[0] if names else END_OF_TEXT)
        self.opening, self.stops = self.end_of_text, (self.end_of_text,)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        specification = json.loads(backend.to_str())
        self.sha256 = value_sha256(specification)
        self.keeps_text = _keeps_text(specification)
        self._piece = _PIECE if _splits_at_spaces(specification) else _LONG_PIECE

    @classmethod
    def plain_bytes(cls) -> Tokenizer:
        return cls(None)

    @classmethod
    def load(cls, path: Path | None, remedy: str = _ANOTHER) -> Tokenizer:
        """From a tokenizer.json or a folder that holds one; None means plain bytes. Raises UserError, which ends in `remedy`
        where the file holds no tokenizer."""
        if path is None:
            return cls(None)
        import tokenizers

        file = path / "tokenizer.json" if path.is_dir() else path
        with readable(str(file), "give a tokenizer.json or its folder"):
            size = file.stat().st_size
            if not file.is_file() or size > _MOST_BYTES:
                raise UserError(f"{file} is no tokenizer.json ({size:,} bytes): give a tokenizer.json or its folder")
            content = file.read_bytes()
        with _refusing(f"{file} is not a tokenizer.json that `tokenizers` can read", remedy):
            specification = parse_object(content)
            _check_vocabulary(specification)
            _check_growth(specification)
            with _library():
                backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        return cls(backend)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with GPT-2's split pattern; the same texts give the same tokenizer.

        The vocabulary is smaller than `vocab_size` where the text has too few pairs to merge.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        # The library takes in 256 texts at once, and needs ten times their memory: small ones then.
        backend.train_from_iterator((piece for text in texts for piece in _pieces([text], _PIECE)), trainer)
        return cls(backend)

    def save(self, folder: Path) -> Path | None:
        """Writes folder/tokenizer.json and returns its path; plain bytes need no file (None)."""
        if self._backend is None:
            return None
        file = folder / "tokenizer.json"
        file.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        return file

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of text."""
        return [token for piece in self.pieces([text]) for token in self.encode_batch([piece])[0]]

    def speak_as(self, opening: int | None, stops: Sequence[int]) -> None:
        """Take prompts as the tokenizer.json's own model does: what its post_processor begins them with, special tokens."""
        if not all(token < self.vocab_size for token in (opening or 0, *stops)):
            raise UserError(f"text.json names tokens beyond the tokenizer's {self.vocab_size:,}: import the checkpoint again")
        self.begins, self._special = self.added()[0], True
        self.opening = self.end_of_text if opening is None else opening
        self.stops = tuple(stops) or self.stops

    def added(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the post_processor puts before and behind a text."""
        if self._backend is None:
            return (), ()
        with _refusing("the tokenizer cannot encode this text"), _library():
            ids = self._backend.encode("a").ids
            plain = self._backend.encode("a", add_special_tokens=False).ids
        start = next(n for n in range(len(ids) + 1) if ids[n : n + len(plain)] == plain)  # they are there
        return tuple(ids[:start]), tuple(ids[start + len(plain) :])

    @property
    def vocabulary(self) -> dict[str, int]:
        """token -> id, special ones included; empty for plain bytes."""
        return {} if self._backend is None else self._backend.get_vocab(with_added_tokens=True)

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of what a model shall go on with: as `encode` but for `speak_as`."""
        if not self._special or self._backend is None:
            return self.encode(text)
        self._backend.encode_special_tokens = False
        try:
            with _refusing("the tokenizer cannot encode this text"), _library():
                tokens = list(self._backend.encode(text, add_special_tokens=False).ids)
        finally:
            self._backend.encode_special_tokens = True
        begins = list(self.begins)
        return tokens if tokens[: len(begins)] == begins else begins + tokens

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Tokens of several texts, each as one piece, on all cores. Memory: about 40 bytes a character."""
        if self._backend is None:
            return [list(text.encode()) for text in texts]
        with _refusing("the tokenizer cannot encode this text"), _library():
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; an end of text is nothing, half a character becomes U+FFFD."""
        if self._backend is None:
            return bytes(token for token in tokens if token < _BYTES).decode("utf-8", errors="replace")
        with _refusing("the tokenizer cannot decode its own tokens"), _library():
            return str(self._backend.decode(list(tokens), skip_special_tokens=True))

    def pieces(self, blocks: Iterable[str]) -> Iterator[str]:
        """Cuts a document, given in blocks of any length, into the pieces that `encode_batch` takes.

        Where the tokenizer splits at spaces anyway, so does this, and the tokens are those of the whole text.
        """
        return _pieces(blocks, self._piece)


def bytes_specification() -> dict[str, Any]:
    """Plain bytes as a tokenizer.json: a byte-level BPE with no merges, in which each byte's stand-in has the byte as id.

    The stand-ins are GPT-2's: printable characters of Latin-1 stand for themselves, the other bytes, in order, for the
    characters from 256 on.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers

    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(_BYTES + n): byte for n, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([END_OF_TEXT])  # the id behind the bytes
    specification: dict[str, Any] = json.loads(backend.to_str())
    specification["decoder"] = specification["pre_tokenizer"]  # undone as it is done
    return specification


def _check_vocabulary(specification: dict[str, Any]) -> None:
    """Raises Unreadable for what the library does not refuse. It allocates memory for every id up to the largest, and it
    panics where the second part of a merge does not begin with the prefix that the library cuts off."""
    model, added = specification.get("model"), specification.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not isinstance(added, list):
        raise Unreadable("it has no vocabulary")
    vocabulary = model["vocab"]
    ids = [] if isinstance(vocabulary, list) else list(vocabulary.values())
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    most = 2 * (len(vocabulary) + len(added)) + _MOST_GAPS
    if not all(is_count(number) and number < most for number in ids):
        raise Unreadable(f"an id of its vocabulary is no whole number below {most:,}")
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if isinstance(prefix, str) and prefix and isinstance(merges, list):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        if not all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) and pair[1].startswith(prefix)
            for pair in pairs
        ):
            raise Unreadable(f"a merge lacks the prefix {prefix[:20]!r}")


def _check_growth(specification: dict[str, Any]) -> None:
    """Raises Unreadable for steps that, one after the other, make a short text a long one: thirty Replaces of a by aa, a
    few thousand bytes, make a letter a gigabyte, already while the library loads them.

    A short text that holds every pattern is taken through them step by step, and looked at after each.
    """
    import tokenizers

    plain = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    for kind, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        steps = _flat(specification.get(kind), inner)
        patterns = "".join(text for step in steps for text in _texts(step))
        if len(steps) > _MOST_STEPS or len(patterns) > _MOST_PATTERNS:
            raise Unreadable(f"its {kind} has more steps, or longer patterns, than any has")
        text = f"{_PROBE}{patterns}"
        most = _MOST_GROWTH * len(text)
        for step in steps:
            # Looked at before: one step alone puts its text in the place of every match.
            if len(text) * max(map(len, _texts(step)), default=1) > _MOST_TEXT:
                raise Unreadable(f"its {kind} makes a short text too long")
            with _library():
                part = getattr(tokenizers.Tokenizer.from_str(json.dumps(plain | {kind: step})), kind)
                if kind == "normalizer":
                    text = part.normalize_str(text)
                elif kind == "pre_tokenizer":
                    text = "".join(piece for piece, _ in part.pre_tokenize_str(text))
                else:
                    text = part.decode([text])
            if len(text) > most:
                raise Unreadable(f"its {kind} makes a short text more than {_MOST_GROWTH} times as long")
    for step in _flat(specification.get("post_processor"), "processors"):
        single = step.get("single")
        pieces = single if isinstance(single, list) else []
        if sum("Sequence" in piece for piece in pieces if isinstance(piece, dict)) > 1:
            raise Unreadable("its post_processor repeats the text")


_PROBE = " The quick brown fox jumps over the lazy dog, 0123456789.\n\téß海 "


def _flat(part: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a part, Sequences within Sequences taken apart, in their order."""
    steps, left = [], [part]
    while left:
        step = left.pop()
        if not isinstance(step, dict):
            continue  # absent, or what the library refuses
        if isinstance(step.get(inner), list):
            left += reversed(step[inner])
        else:
            steps.append(step)
    return steps


def _texts(step: Any) -> list[str]:
    """All text in a step: patterns, what stands in their place, what comes before."""
    texts, left = [], [step]
    while left:
        part = left.pop()
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            left += reversed([value for key, value in part.items() if key not in ("type", "precompiled_charsmap")])
    return texts


@contextlib.contextmanager
def _refusing(sentence: str, remedy: str = _ANOTHER) -> Iterator[None]:
    """What is Unreadable inside is a UserError."""
    try:
        yield
    except Unreadable as error:
        raise UserError(f"{sentence} ({error}): {remedy}") from error


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Around nothing but calls of `tokenizers`: what it makes of a specification that is not sound is Unreadable.

    It raises plain Exception, and where its Rust code gives up a PanicException, which is none.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Unreadable(in_a_line(error)) from error


def _pieces(blocks: Iterable[str], size: int) -> Iterator[str]:
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > size:
            cut = _cut(rest, start, start + size)
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def _cut(text: str, start: int, stop: int) -> int:
    """The last place in text[start:stop] before a single space between two letters, else `stop`."""
    place = text.rfind(" ", start + 1, stop)
    while place > start:
        if text[place - 1].isalpha() and text[place + 1].isalpha():
            return place
        place = text.rfind(" ", start + 1, place)
    return stop


def _splits_at_spaces(specification: dict[str, Any]) -> bool:
    """Whether a tokenizer cuts before a space between letters whatever stands around: GPT-2's pattern does."""
    pre_tokenizer = specification["pre_tokenizer"] or {}
    return (
        specification["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space", True)
    )


def _keeps_text(specification: dict[str, Any]) -> bool:
    """Whether tokens surely tell every byte of their text: those of a byte-level BPE to which nothing is done before."""
    from tokenizers import pre_tokenizers

    model, steps = specification["model"], _flat(specification["pre_tokenizer"], "pretokenizers")
    return (
        not _flat(specification["normalizer"], "normalizers")
        and any(step["type"] == "ByteLevel" for step in steps)
        and all(step["type"] in ("ByteLevel", "Split", "Digits") for step in steps)
        and not any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps)
        and model["type"] == "BPE"
        and not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
        and model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
        and not any(token["lstrip"] or token["rstrip"] for token in specification["added_tokens"] if not token["special"])
    )


def text_before(decode: Callable[[Sequence[int]], str], tokens: Sequence[int], count: int) -> str:
    """The text of the first `count` tokens of a document; of a character that is cut in two there, nothing.

    tokens: of the document, at least the one behind the cut. U+FFFD stands for a part of a character, and may be one of the
    text's own: then the next token adds to the text and leaves it alone.
    """
    text = decode(tokens[:count])
    if not text.endswith("\N{REPLACEMENT CHARACTER}") or count >= len(tokens):
        return text
    longer = decode(tokens[: count + 1])
    return text if longer.startswith(text) and longer != text else text[:-1]


def tokenizer_fingerprint(file: Path | None) -> str:
    """SHA-256 of a tokenizer.json; "bytes" where tokens are plain bytes."""
    return "bytes" if file is None else file_sha256(file)
