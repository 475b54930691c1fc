"""Text to tokens and back: a byte-level BPE trained here, plain bytes, or any pretrained tokenizer.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.outside import is_count, parse_object

END_OF_TEXT = "<|endoftext|>"
# How pretrained tokenizers call it, in the order of preference.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]", "[SEP]")
_BYTES = 256  # plain bytes: ids below are bytes, this one ends a document
_MOST_BYTES = 1 << 28  # the largest published ones have a tenth
_MOST_GAPS = 2**20  # ids without a token
_PIECE = 32_768  # characters in which a document is encoded where the cut cannot be seen in the tokens
_LONG_PIECE = 8_388_608  # likewise where it can: one cut in eight million characters, so that memory stays bounded


class Tokenizer:
    """Made by `plain_bytes`, `load` or `train_bpe`.

    vocab_size: ids are below it. end_of_text: the id that follows each document. sha256: of all that shapes the
    tokens. Special tokens in a text are encoded as the characters that they are, never as the special token.
    """

    def __init__(self, backend: Any | None) -> None:
        """`backend`: a `tokenizers.Tokenizer`; None means plain bytes."""
        self._backend = backend
        self.vocab_size, self.end_of_text = _BYTES + 1, _BYTES
        self.sha256 = hashlib.sha256(b"bytes").hexdigest()
        self._piece = _PIECE
        if backend is None:
            return
        backend.no_truncation()
        backend.no_padding()
        names = [name for name in _END_OF_TEXT_NAMES if backend.token_to_id(name) is not None]
        if not names:
            backend.add_special_tokens([END_OF_TEXT])
        backend.encode_special_tokens = True
        self.end_of_text = backend.token_to_id(names[0] if names else END_OF_TEXT)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        specification = json.loads(backend.to_str())
        self.sha256 = hashlib.sha256(json.dumps(specification, sort_keys=True).encode()).hexdigest()
        self._piece = _PIECE if _splits_at_spaces(specification) else _LONG_PIECE

    @classmethod
    def plain_bytes(cls) -> Tokenizer:
        return cls(None)

    @classmethod
    def load(cls, path: Path | None) -> Tokenizer:
        """From a tokenizer.json or a folder that holds one; None means plain bytes."""
        if path is None:
            return cls(None)
        import tokenizers

        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            size = file.stat().st_size
            if not file.is_file() or size > _MOST_BYTES:
                raise UserError(f"{file} is no tokenizer.json ({size:,} bytes): give a tokenizer.json or its folder")
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}): give a tokenizer.json or its folder") from error
        with _refusing(f"{file} is not a tokenizer.json that `tokenizers` can read"):
            _check_vocabulary(parse_object(content))
            return cls(tokenizers.Tokenizer.from_str(content.decode("utf-8")))

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

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Tokens of several texts, each as one piece, on all cores. Memory: about 40 bytes a character."""
        if self._backend is None:
            return [list(text.encode()) for text in texts]
        with _refusing("the tokenizer cannot encode this text"):
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; an end of text is nothing, half a character becomes U+FFFD."""
        if self._backend is None:
            return bytes(token for token in tokens if token < _BYTES).decode("utf-8", errors="replace")
        with _refusing("the tokenizer cannot decode its own tokens"):
            return str(self._backend.decode(list(tokens), skip_special_tokens=True))

    def pieces(self, blocks: Iterable[str]) -> Iterator[str]:
        """Cuts a document, given in blocks of any length, into the pieces that `encode_batch` takes.

        Where the tokenizer splits at spaces anyway, so does this, and the tokens are those of the whole text.
        """
        return _pieces(blocks, self._piece)


def _check_vocabulary(specification: dict[str, Any]) -> None:
    """Raises ValueError for what the library would not refuse: it takes memory for all ids up to the largest, and breaks
    down, with words of its own on stderr, where the second part of a merge lacks the prefix that it is to lose."""
    model, added = specification.get("model"), specification.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not isinstance(added, list):
        raise ValueError("it has no vocabulary")
    vocabulary = model["vocab"]
    ids = [] if isinstance(vocabulary, list) else list(vocabulary.values())
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    most = 2 * (len(vocabulary) + len(added)) + _MOST_GAPS
    if not all(is_count(number) and number < most for number in ids):
        raise ValueError(f"an id of its vocabulary is no whole number below {most:,}")
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if isinstance(prefix, str) and prefix and isinstance(merges, list):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        if not all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) and pair[1].startswith(prefix)
            for pair in pairs
        ):
            raise ValueError(f"a merge lacks the prefix {prefix[:20]!r}")


@contextlib.contextmanager
def _refusing(sentence: str) -> Iterator[None]:
    """What the library makes of a specification that is not sound is a UserError.

    It raises plain Exception, and where its Rust code gives up a PanicException, which is none.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{sentence} ({reason}): take another tokenizer.json") from error


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
