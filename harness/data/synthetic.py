"""Corpora of questions whose answers stand in the context: what attention alone can do, and a small cache may lose.

mqar      multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, section 3): pairs of a key and
          a value, and keys that were there before, each followed by its value again: a7b!a7c0b!...
passkey   a number at some depth of filler, asked for at the end (Mohtashami and Jaggi 2023, arXiv 2305.16300, section
          4.2, whose filler this is)

Every symbol is one ASCII character, so one token of tokenizer=bytes, and every document has the same length: where
model.max_seq_len is a multiple of it, training windows begin with documents. As in Zoology's data the distance between
a key and its next query follows a power law; there the loss counts answers alone, here it is the usual one of all tokens.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import string
from collections.abc import Callable, Iterator

import numpy as np

from harness.config.schema import DatasetConfig
from harness.data.documents import EVALUATION_FIRST, Document, Source
from harness.errors import UserError

TASKS = ("mqar", "passkey")
KEYS = string.ascii_letters
VALUES = string.digits + string.punctuation
_RECENCY = list(itertools.accumulate(1 / rank for rank in range(1, len(KEYS) + 1)))
CUE = " The pass key is:"  # before the key both times
KEY_DIGITS = 5
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_TRIES = 1000  # draws of one document before there are held to be no others


def synthetic_source(dataset: DatasetConfig) -> Source:
    """The documents of a checked dataset, each split from a stream of its own; training has none of the others'.

    Raises UserError, while they are drawn, where the task has too few different documents.
    """
    make = {"mqar": _mqar, "passkey": _passkey}[str(dataset.synthetic_task)]
    counts = split_sizes(dataset)

    def documents() -> Iterator[Document]:
        held_out: set[str] = set()  # of the splits before this one
        for number, split in enumerate(EVALUATION_FIRST):
            rng = np.random.Generator(np.random.PCG64([dataset.split_seed, TASKS.index(str(dataset.synthetic_task)), number]))
            own = set()
            for _ in range(counts[split]):
                text = _new(make, dataset, rng, held_out)
                own.add(text)
                yield Document(split, (text,))
            if split != "train":
                held_out |= own

    fields = dataclasses.asdict(dataset)
    identity = {"source": "synthetic"} | {
        name: fields[name]
        for name in (
            "synthetic_task",
            "synthetic_documents",
            "synthetic_tokens",
            "synthetic_pairs",
            "validation_fraction",
            "test_fraction",
            "split_seed",
        )
        if name != "synthetic_pairs" or dataset.synthetic_task == "mqar"
    }
    return Source(identity, documents, sum(counts.values()) * (dataset.synthetic_tokens - 1))


def split_sizes(dataset: DatasetConfig) -> dict[str, int]:
    """Documents of each split."""
    total = dataset.synthetic_documents
    validation, test = round(dataset.validation_fraction * total), round(dataset.test_fraction * total)
    return {"validation": validation, "test": test, "train": total - validation - test}


def synthetic_problems(dataset: DatasetConfig) -> list[str]:
    """What is wrong with the synthetic_ fields, a sentence each."""
    if dataset.synthetic_task not in TASKS:
        return [f"dataset.synthetic_task={dataset.synthetic_task} is unknown: choose one of {', '.join(TASKS)}"]
    problems = []
    if dataset.synthetic_documents < 1:
        problems.append(f"dataset.synthetic_documents={dataset.synthetic_documents} must be at least 1")
    pairs = dataset.synthetic_pairs
    if dataset.synthetic_task == "passkey":
        least = 1 + _statement_length() + len(CUE) + KEY_DIGITS
    elif not pairs or min(pairs) < 1 or max(pairs) > len(KEYS):
        return [*problems, f"dataset.synthetic_pairs={pairs} must be numbers from 1 to {len(KEYS)}, as there are keys"]
    else:
        least = 4 * max(pairs) + 2  # as many queries as pairs, the end of the line and that of the text
        if dataset.synthetic_tokens % 2:
            problems.append(
                f"dataset.synthetic_tokens={dataset.synthetic_tokens} must be even: pairs and queries are two tokens each"
            )
    if dataset.synthetic_tokens < least:
        asked = (
            "a statement and a question" if dataset.synthetic_task == "passkey" else f"{max(pairs)} pairs and as many queries"
        )
        problems.append(
            f"dataset.synthetic_tokens={dataset.synthetic_tokens} have no room for {asked}, which take {least}: raise it"
            + (" or lower dataset.synthetic_pairs" if dataset.synthetic_task == "mqar" else "")
        )
    return problems


def _new(
    make: Callable[[DatasetConfig, np.random.Generator], str],
    dataset: DatasetConfig,
    rng: np.random.Generator,
    held_out: set[str],
) -> str:
    """A document that no earlier split holds."""
    for _ in range(_TRIES):
        if (text := make(dataset, rng)) not in held_out:
            return text
    raise UserError(
        f"{dataset.name} has hardly a document that validation and test ({len(held_out)} documents) do not hold: lower "
        f"dataset.synthetic_documents={dataset.synthetic_documents}, or raise dataset.synthetic_pairs"
    )


def _mqar(dataset: DatasetConfig, rng: np.random.Generator) -> str:
    """Key and value by turns: n keys come for the first time at random places, the others are asked for again.

    Keys differ, values are drawn each by itself. The r-th newest key is asked for with a probability in proportion to
    1 / r: recall over two tokens is learned at once and is the way to that over the whole document. With all queries
    behind all pairs `tiny` found no more than the set of values in 2 million tokens, at rates of 0.0015 and 0.005.
    """
    n = int(rng.choice(dataset.synthetic_pairs))
    items = (dataset.synthetic_tokens - 2) // 2
    keys, values = rng.permutation(len(KEYS))[:n], rng.integers(0, len(VALUES), n)
    pairs = [KEYS[key] + VALUES[value] for key, value in zip(keys, values, strict=True)]
    states = {0, *(1 + rng.permutation(items - 1)[: n - 1]).tolist()}
    recent: list[str] = []  # the pairs so far, the newest last
    text = []
    for item, draw in enumerate(rng.random(items).tolist()):
        if item in states:
            pair = pairs.pop()
        else:
            rank = bisect.bisect_right(_RECENCY, draw * _RECENCY[len(recent) - 1], hi=len(recent) - 1)
            pair = recent.pop(-1 - rank)
        recent.append(pair)
        text.append(pair)
    return "".join(text) + "\n"


def _passkey(dataset: DatasetConfig, rng: np.random.Generator) -> str:
    """The statement stands between two sentences; the filler ends with one of them, its first may be cut."""
    key = "".join(str(digit) for digit in rng.integers(0, 10, KEY_DIGITS))
    room = dataset.synthetic_tokens - 1 - _statement_length() - len(CUE) - KEY_DIGITS
    ends = [place + 1 for place, symbol in enumerate(FILLER) if symbol == "."]
    end = int(rng.choice(ends))
    filler = (FILLER * (room // len(FILLER) + 2))[: len(FILLER) * (room // len(FILLER) + 1) + end][-room:] if room else ""
    borders = [0, *(place + 1 for place, symbol in enumerate(filler) if symbol == ".")]
    depth = int(rng.choice(borders))
    return f"{filler[:depth]}{CUE}{key}.{filler[depth:]}{CUE}{key}"


def _statement_length() -> int:
    return len(CUE) + KEY_DIGITS + 1
