"""Which encoding bytes show that are not UTF-8, and the command that converts their file.

A byte order mark or zeros in a pattern say UTF-16 and UTF-32. Of encodings of one byte a character all but a few read
anything: the one is named in which accented letters stand among letters of their script and quotation marks around words.
"""

from __future__ import annotations

import codecs
import shlex
import unicodedata
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_PACKED = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"%PDF", "PDF"),
    (b"PAR1", "parquet"),
)
# As Python and as iconv call them, the likelier first. The first two agree but for 0x80 to 0x9f.
_LATIN = (("latin-1", "ISO-8859-1"), ("cp1252", "CP1252"), ("mac-roman", "MACINTOSH"), ("cp850", "CP850"))
_CYRILLIC = (("cp1251", "CP1251"), ("koi8-r", "KOI8-R"))
_AROUND_WORDS = "‘’“”‚„–—…•€£§°«»©®™²³½¼¾\u00a0¿¡"
_IN_WORDS = "’–—\u00a0"
_SURE = 0.9  # share of the letters and marks that must look right
_SAMPLE = 1 << 16
_ZEROS = 0.15  # share of zero bytes from which on they are a pattern


def shown_encoding(head: bytes, sample: bytes) -> str | None:
    """iconv's name of the encoding, None where the bytes show none (packed, damaged UTF-8, unknown).

    head: the first bytes of the file. sample: bytes around the first one that is wrong, as a whole piece of the text.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if packed_as(head) is not None:
        return None
    sample = sample[:_SAMPLE]
    if wide := _wide(head if len(head) > 64 else sample):
        return wide
    if is_damaged_utf8(sample):
        return None
    high = sum(byte >= 0x80 for byte in sample)
    letters = sum(byte >= 0x80 or chr(byte).isalpha() for byte in sample)
    found = [(_plausible(sample, codec), name) for codec, name in (_CYRILLIC if 2 * high > letters else _LATIN)]
    best, name = max(found, key=lambda one: one[0])  # the first of equal ones
    return name if best >= _SURE else None


def packed_as(head: bytes) -> str | None:
    """The kind of file, where it is no text at all."""
    return next((kind for magic, kind in _PACKED if head.startswith(magic)), None)


def is_damaged_utf8(sample: bytes) -> bool:
    """Whether more characters beyond ASCII are right in UTF-8 than bytes are wrong."""
    text = sample[:_SAMPLE].decode("utf-8", errors="surrogateescape")
    wrong = sum("\udc80" <= character <= "\udcff" for character in text)
    return sum(character > "\x7f" for character in text) > 2 * wrong


def advice(path: Path, head: bytes, sample: bytes, compression: str | None) -> str:
    """What to do with a text file that is not UTF-8: half a sentence, with the very command where one can be said."""
    kind = packed_as(head)
    if kind in ("gzip", "zstd"):
        return f"it is packed by {kind}: let its name end in {'.gz' if kind == 'gzip' else '.zst'}"
    if kind is not None:
        return f"it is a {kind} file and no text: unpack or convert it, or leave it out"
    encoding = shown_encoding(head, sample)
    if encoding is not None:
        return f"its bytes are {encoding}: convert it with `{_command(path, encoding, compression)}`"
    if is_damaged_utf8(sample):
        return "it is UTF-8 with damaged bytes: take a whole copy, correct the place, or leave it out"
    return "its bytes show no encoding: find out which it is and convert it (iconv -f ENCODING -t UTF-8), or leave it out"


def _command(path: Path, encoding: str, compression: str | None) -> str:
    file, made = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    convert = f"iconv -f {encoding} -t UTF-8"
    if compression is not None:
        return f"{compression} -dc {file} | {convert} | {compression} -c > {made} && mv {made} {file}"
    return f"{convert} {file} > {made} && mv {made} {file}"


def _wide(data: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark, which text of mostly ASCII shows by its zeros. data: from the file's first byte."""
    data = data[: len(data) // 4 * 4]
    if not data or data.count(0) < _ZEROS * len(data):
        return None
    zeros = [data[place::4].count(0) / (len(data) // 4) for place in range(4)]
    patterns = {
        "UTF-32LE": (zeros[2], zeros[3]),
        "UTF-32BE": (zeros[0], zeros[1]),
        "UTF-16LE": (zeros[1], zeros[3]),
        "UTF-16BE": (zeros[0], zeros[2]),
    }
    for name, (first, second) in patterns.items():
        if min(first, second) > 0.5 and _decodes(data, name):
            return name
    return None


def _decodes(data: bytes, codec: str) -> bool:
    try:
        codecs.getincrementaldecoder(codec)().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def _plausible(sample: bytes, codec: str) -> float:
    """The share of the characters beyond ASCII that look right where they stand; 0 where the codec cannot read it."""
    try:
        text = sample.decode(codec)
    except UnicodeDecodeError:
        return 0.0
    right = seen = 0
    for before, character, after in zip(" " + text, text, text[1:] + " ", strict=False):
        if character > "\x7f":
            seen += 1
            right += _looks_right(before, character, after)
    return right / max(seen, 1)


def _looks_right(before: str, character: str, after: str) -> bool:
    between_letters = before.isalpha() and after.isalpha()
    if not character.isalpha():
        return character in (_IN_WORDS if between_letters else _AROUND_WORDS)
    if character.isupper() and before.islower():
        return False
    return all(_script(character) == _script(other) for other in (before, after) if other.isalpha())


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
