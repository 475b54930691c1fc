"""The names of what a cache keeps, read without torch: what they mean is in modeling/attention/quantisation.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modeling.refusal import Refusal

BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "fp8": 8, "int4": 4}  # of an element, without scales
OF_BITS = {"16": "bfloat16", "8": "int8", "4": "int4"}  # in kXvY
PAIR = re.compile(r"k(c?)(\d+)v(\d+)")
ROTATED = "_rotated"
FORMS = (
    f"{', '.join(BITS)}, or kXvY for keys in X and values in Y bits, two of {', '.join(OF_BITS)} (k8v4); {ROTATED} behind "
    f"one of less than 16 bits turns vectors before they are stored (int4{ROTATED}); kcXvY has a scale for each channel of "
    f"some tokens' keys, X 8 or 4 (kc4v4)"
)


@dataclass(frozen=True)
class FormatName:
    """What a name says. keys: of keys, and of what is key and value at once; both sides are keys of BITS."""

    keys: str
    values: str
    rotated: bool
    by_channel: bool

    @property
    def in_few_bits(self) -> bool:
        """Whether something is stored in less than 16 bits, so that a model computes something else through it."""
        return min(BITS[self.keys], BITS[self.values]) < 16


def read_format(name: str) -> FormatName:
    """Raises Refusal, with the forms there are, for a name that has none of them."""
    base = name.removesuffix(ROTATED)
    pair = PAIR.fullmatch(base)
    keys, values = (OF_BITS.get(bits, "") for bits in pair.groups()[1:]) if pair else (base, base)
    by_channel = pair is not None and pair[1] == "c"
    if not (keys in BITS and values in BITS) or (by_channel and BITS[keys] == 16):
        raise Refusal(f"{name} is unknown; choose one of {FORMS}")
    if pair and keys == values and not by_channel:
        raise Refusal(f"{name} is {keys}{name.removeprefix(base)} by another name: write that")
    read = FormatName(keys, values, rotated=base != name, by_channel=by_channel)
    if read.rotated and not read.in_few_bits:
        raise Refusal(f"{name} would turn what is stored as it is: write {base}")
    if read.rotated and by_channel:
        raise Refusal(f"{name} would mix the channels that have scales of their own: write {base}")
    return read
