"""Recall from the context, from what a model of any size shows to what only one that recalls can do.

passkey   a number stated at some depth of real text and asked for at its end (Mohtashami and Jaggi 2023, arXiv
          2305.16300, section 4.2), beside the same prompt in which it was not stated
copying   random tokens twice over: the second copy's loss against the first's (Olsson et al. 2022, arXiv 2209.11895)
answers   on a corpus of questions (dataset=mqar, dataset=passkey) the answers of the split itself: multi-query
          associative recall (Arora et al. 2023, arXiv 2312.04927) by number of pairs and by distance

An answer counts as right where it has the largest logit given the prompt and the true answers before it, so all of them
are right exactly where greedy decoding gives them. Letters: B prompts, T tokens, A answers of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from harness.data.synthetic import CUE, KEY_DIGITS
from harness.evaluation.perplexity import Integers, evenly
from harness.evaluation.probes import Probe, Subject, at_floor, said_of_floor
from harness.files.text import number
from modeling.gpt import GPT

_PROMPTS = 64  # of a length, at most
_CHUNK = 4096  # answers whose logits are held at a time
_SHORT = "the text or the window is too short for a prompt"
_WHY_NOT = {"passkey": f"{_SHORT}, or a digit is no token of its own", "copying": _SHORT}


def measure_recall(subject: Subject) -> dict[str, Any] | None:
    """passkey, copying and answers as above, each None where it does not apply; None where none does.

    The prompts depend on the split, the tokenizer and the training length, not on the model: variants are compared on
    the same ones. Half of max_tokens goes to each of passkey and copying, all of it to answers.
    """
    asked = subject.dataset in _FINDERS
    trained = subject.model.max_seq_len
    models = {
        trained // 4: subject.model,
        trained // 2: subject.model,
        trained: subject.model,
        2 * trained: subject.longer(2 * trained),
    }
    figures = {
        "passkey": None if asked else measure_passkey(subject, models),  # its text would hold other keys
        "copying": measure_copying(subject, models),
        "answers": measure_answers(subject) if asked else None,
    }
    return figures if any(value is not None for value in figures.values()) else None


def recall_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """For people: one row for each length, for each number of pairs and for each octave of distances, or why there is none."""
    rows = []
    for task in ("passkey", "copying"):
        if figures[task] is None and figures["answers"] is None:
            rows.append((task, f"not measured: {_WHY_NOT[task]}"))
    for entry in figures["passkey"] or []:
        rows.append(
            (
                f"passkey in {entry['length']}",
                f"{100 * entry['accuracy']:.1f} % found; {entry['loss']:.3f} nats a digit, {entry['unshown_loss']:.3f} where "
                f"it was not stated: {number(entry['gain'], '.3f')} gained (a digit at random: {entry['chance_loss']:.3f})"
                f"{said_of_floor(entry)}",
            )
        )
    for entry in figures["copying"] or []:
        rows.append(
            (
                f"copying in {entry['length']}",
                f"{entry['second_loss']:.3f} nats, {entry['first_loss']:.3f} the first time: "
                f"{number(entry['gain'], '.3f')} gained; {100 * entry['accuracy']:.1f} % right{said_of_floor(entry)}",
            )
        )
    if answers := figures["answers"]:
        newest = f", the newest value: {100 * answers['newest']:.1f} %" if answers["newest"] is not None else ""
        rows.append(
            (
                "answers",
                f"{100 * answers['accuracy']:.1f} % right (at random: {100 * answers['chance']:.1f} %{newest}), "
                f"{answers['loss']:.3f} nats; all right in {100 * answers['exact']:.1f} % of {answers['documents']:,}"
                f"{said_of_floor(answers)}",
            )
        )
        rows += [
            (f"  of {entry['pairs']} pairs", f"{100 * entry['accuracy']:.1f} % right, {entry['loss']:.3f} nats")
            for entry in answers["by_pairs"]
        ]
        rows += [
            (f"  {entry['low']}-{entry['high']} back", f"{100 * entry['accuracy']:.1f} % right, {entry['loss']:.3f} nats")
            for entry in answers["by_distance"]
        ]
    return rows


def measure_passkey(subject: Subject, models: dict[int, GPT | None]) -> list[dict[str, Any]] | None:
    """By prompt length (input tokens): accuracy of the whole key, and nats per digit with and without it stated.

    accuracy: of prompts whose digits are all right; chance: of that by guessing digits; digit_accuracy: of single digits;
    at_floor: that one is no better than guessing.
    loss: nats per digit; chance_loss: of one who knows that digits come, ln 10; unshown_loss: where real text stands in
    place of the statement, all else equal; gain: unshown_loss - loss. prompts: depth (0: the statement is the first
    thing, 1: the last before the question), loss and unshown_loss of each; the same texts, keys and relative depths at
    every length. None where a digit is no token of its own or where no length has room.
    """
    digits = [subject.encode(digit) for digit in "0123456789"]
    if any(len(tokens) != 1 for tokens in digits):
        return None
    alphabet = np.array(digits, dtype=np.int64)[:, 0]
    cue, stop = np.array(subject.encode(CUE), dtype=np.int64), np.array(subject.encode("."), dtype=np.int64)
    fixed = 1 + 2 * (len(cue) + KEY_DIGITS) + len(stop)  # the end of text before the prompt included
    room = {length: length + 1 - fixed for length in models}
    room = {length: filler for length, filler in room.items() if filler > 0}
    count = min(_PROMPTS, subject.max_tokens // 2 // max(1, 2 * sum(room)))
    if not room or count < 1:
        return None
    texts = _texts(subject, count, max(room.values()) + len(cue) + KEY_DIGITS + len(stop))
    if texts is None:
        return None
    keys_BA = alphabet[np.random.default_rng(0).integers(0, len(alphabet), (count, KEY_DIGITS))]
    depths = np.linspace(0, 1, count) if count > 1 else np.array([0.5])

    figures = []
    for length, filler in room.items():
        if (model := models[length]) is None:
            continue
        shown: list[Integers] = []
        unshown: list[Integers] = []
        for text, key, depth in zip(texts, keys_BA, depths, strict=True):
            cut, statement = round(float(depth) * filler), np.concatenate((cue, key, stop))
            spare = text[filler : filler + len(statement)]
            for prompts, said in ((shown, statement), (unshown, spare)):
                prompts.append(np.concatenate(([subject.end_of_text], text[:cut], said, text[cut:filler], cue, key)))
        places_BA = np.tile(np.arange(length + 1 - KEY_DIGITS, length + 1), (count, 1))
        nats_BA, right_BA = scored(subject, model, np.stack(shown), places_BA)
        without_BA, _ = scored(subject, model, np.stack(unshown), places_BA)
        figures.append({"length": length} | _passkey_figures(depths, right_BA, nats_BA, without_BA, len(alphabet)))
    return figures or None


def _passkey_figures(
    depths: NDArray[np.float64],
    right_BA: NDArray[np.bool_],
    nats_BA: NDArray[np.float64],
    without_BA: NDArray[np.float64],
    digits: int,
) -> dict[str, Any]:
    """Of one length: what `measure_passkey` says. without_BA: the nats where the key was not stated."""
    return {
        "accuracy": float(right_BA.all(axis=1).mean()),
        "chance": float(digits) ** -KEY_DIGITS,
        "digit_accuracy": float(right_BA.mean()),
        "at_floor": at_floor(float(right_BA.mean()), 1 / digits, right_BA.size),
        "loss": float(nats_BA.mean()),
        "chance_loss": math.log(digits),
        "unshown_loss": float(without_BA.mean()),
        "gain": float((without_BA - nats_BA).mean()),
        "prompts": [
            {
                "depth": float(depth),
                "right": bool(right.all()),
                "loss": float(nats.mean()),
                "unshown_loss": float(without.mean()),
            }
            for depth, right, nats, without in zip(depths, right_BA, nats_BA, without_BA, strict=True)
        ],
    }


def _texts(subject: Subject, count: int, size: int) -> list[Integers] | None:
    """`count` pieces of `size` tokens from evenly spread places of the split, ends of text left out; None: too short."""
    tokens = subject.split.tokens
    stretch = 2 * size  # half of it may be ends of text
    if len(tokens) < stretch:
        return None
    texts = []
    for start in np.linspace(0, len(tokens) - stretch, count).astype(int):
        piece = tokens[start : start + stretch].astype(np.int64)
        piece = piece[piece != subject.end_of_text][:size]
        if len(piece) < size:
            return None
        texts.append(piece)
    return texts


def measure_copying(subject: Subject, models: dict[int, GPT | None]) -> list[dict[str, Any]] | None:
    """By prompt length: nats per token of n = length / 2 random tokens, and of the same ones said again at once.

    The tokens are drawn from the split, each by itself, so that their frequencies are the text's and their order says
    nothing. first_loss, second_loss: of the tokens from the second one on in either copy (before a copy's first token
    nothing says what comes), gain: their difference, accuracy: in the second copy, at_floor: that is no better than in the
    first one. None where there is no room.
    """
    lengths = [length for length in models if length >= 4]
    count = min(_PROMPTS, subject.max_tokens // 2 // max(1, sum(lengths)))
    if not lengths or count < 1:
        return None
    rng = np.random.default_rng(1)
    n_longest = max(lengths) // 2
    drawn = subject.split.tokens[rng.integers(0, len(subject.split.tokens), 4 * count * n_longest)].astype(np.int64)
    drawn = drawn[drawn != subject.end_of_text][: count * n_longest]
    if len(drawn) < count * n_longest:
        return None
    longest_BT = drawn.reshape(count, n_longest)
    figures = []
    for length in lengths:
        if (model := models[length]) is None:
            continue
        n = length // 2
        opening_B1 = np.full((count, 1), subject.end_of_text, dtype=np.int64)
        tokens_BT = np.concatenate((opening_B1, longest_BT[:, :n], longest_BT[:, :n]), axis=1)
        places_BA = np.tile(np.concatenate((np.arange(2, n + 1), np.arange(n + 2, 2 * n + 1))), (count, 1))
        nats_BA, right_BA = scored(subject, model, tokens_BT, places_BA)
        first, second = float(nats_BA[:, : n - 1].mean()), float(nats_BA[:, n - 1 :].mean())
        unseen, seen = float(right_BA[:, : n - 1].mean()), float(right_BA[:, n - 1 :].mean())
        figures.append(
            {
                "length": 2 * n,
                "first_loss": first,
                "second_loss": second,
                "gain": first - second,
                "accuracy": seen,
                "at_floor": at_floor(seen, unseen, right_BA.size // 2),
                "copies": count,
            }
        )
    return figures or None


def measure_answers(subject: Subject) -> dict[str, Any] | None:
    """Accuracy and loss at the answers of the split's documents, each read from its start behind an end of text.

    accuracy and loss: per answer token, which is the value of every key that was there before (mqar) or every digit of
    the key (passkey); exact: documents all of whose answers are right; chance: accuracy of one who guesses among the
    values there are; newest (None for passkey): of one who says the value that came last, which needs no recall and is
    often right, since the newest keys are asked for most; at_floor: accuracy is no better than both of these; by_pairs
    (empty for passkey): by number of pairs in the document; by_distance: by tokens between where an answer stood last and
    where it is asked for. Documents longer than the window and those without a question are left out, and so are the
    tokens beyond max_tokens. None where no document is left.
    """
    found = _asked(subject)
    if not found:
        return None

    most = max(len(tokens) for tokens, *_ in found)
    answers_most = max(len(places) for _, places, *_ in found)
    tokens_BT = np.full((len(found), most + 1), subject.end_of_text, dtype=np.int64)
    places_BA = np.zeros((len(found), answers_most), dtype=np.int64)
    distance_BA = np.zeros_like(places_BA)
    pairs_B = np.array([pairs for *_, pairs, _ in found])
    for row, (tokens, places, distances, _, _) in enumerate(found):
        tokens_BT[row, 1 : len(tokens) + 1] = tokens
        places_BA[row, : len(places)] = np.array(places) + 1
        distance_BA[row, : len(places)] = distances
    asked_BA = places_BA > 0
    newest_BA = np.take_along_axis(tokens_BT, np.maximum(places_BA - 2, 0), axis=1) == np.take_along_axis(
        tokens_BT, places_BA, axis=1
    )
    nats_BA, right_BA = scored(subject, subject.model, tokens_BT, np.maximum(places_BA, 1))

    def part(chosen_BA: NDArray[np.bool_]) -> dict[str, Any]:
        return {
            "accuracy": float(right_BA[chosen_BA].mean()),
            "loss": float(nats_BA[chosen_BA].mean()),
            "answers": int(chosen_BA.sum()),
        }

    octaves = [(2**power, 2 ** (power + 1) - 1) for power in range(int(distance_BA.max()).bit_length())]
    by_distance = [
        {"low": low, "high": high, **part(chosen_BA)}
        for low, high in octaves
        if (chosen_BA := asked_BA & (low <= distance_BA) & (distance_BA <= high)).any()
    ]
    values = set().union(*(values for *_, values in found))
    all_of_them, chance = part(asked_BA), 1 / len(values)
    newest = float(newest_BA[asked_BA].mean()) if subject.dataset == "mqar" else None
    return all_of_them | {
        "chance": chance,
        "newest": newest,
        "at_floor": at_floor(all_of_them["accuracy"], max(chance, newest or 0.0), all_of_them["answers"]),
        "exact": float((right_BA | ~asked_BA).all(axis=1).mean()),
        "documents": len(found),
        "by_pairs": [
            {"pairs": int(pairs), **part(asked_BA & (pairs_B == pairs)[:, None])} for pairs in np.unique(pairs_B) if pairs
        ],
        "by_distance": by_distance,
    }


def _asked(subject: Subject) -> list[tuple[Integers, list[int], list[int], int, set[str]]]:
    """The tokens of evenly spread documents that ask something and fit the window, and what `_Found` says of their text."""
    find = _FINDERS[subject.dataset]
    starts, limit = subject.split.document_starts, subject.model.max_seq_len
    whole = [index for index in range(len(starts) - 1) if starts[index + 1] - starts[index] <= limit]
    found = []
    for index in (whole[i] for i in evenly(len(whole), max(1, subject.max_tokens // limit))):
        tokens = subject.split.tokens[starts[index] : starts[index + 1] - 1].astype(np.int64)
        text = subject.decode(tokens.tolist())
        # A tokenizer that joins characters leaves no token that is the answer alone.
        if len(text) == len(tokens) and (answers := find(text)) is not None:
            found.append((tokens, *answers))
    return found


_Found = tuple[list[int], list[int], int, set[str]]


def _mqar_answers(text: str) -> _Found | None:
    """Places of the answers, distances back to where each stood last, number of pairs, the values; None: no question."""
    newest: dict[str, int] = {}  # key -> place of its value
    places, distances = [], []
    for place in range(1, len(text), 2):
        key = text[place - 1]
        if key in newest:
            places.append(place)
            distances.append(place - newest[key])
        newest[key] = place
    return (places, distances, len(newest), set(text[1::2])) if places else None


def _passkey_answers(text: str) -> _Found | None:
    """As _mqar_answers; the answers are the digits behind the text's last cue."""
    asked, stated = text.rfind(CUE) + len(CUE), text.find(CUE) + len(CUE)
    if stated == asked or len(text) < asked + KEY_DIGITS:
        return None
    return list(range(asked, asked + KEY_DIGITS)), [asked - stated] * KEY_DIGITS, 0, set("0123456789")


_FINDERS = {"mqar": _mqar_answers, "passkey": _passkey_answers}


def scored(
    subject: Subject, model: GPT, tokens_BT: Integers, places_BA: Integers
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Nats of the tokens at these places (columns of tokens_BT, from 1), and whether each has the largest logit."""
    nats, right = [], []
    for batch in _batches(len(tokens_BT), max(1, subject.batch_size * subject.model.max_seq_len // tokens_BT.shape[1])):
        tokens = torch.from_numpy(tokens_BT[batch]).to(subject.device)
        places = torch.from_numpy(places_BA[batch]).to(subject.device)
        with (
            torch.no_grad(),
            torch.autocast(subject.device.type, dtype=subject.precision, enabled=subject.precision != torch.float32),
        ):
            shown = tokens[:, :-1]
            through = subject.through
            x_BTD = model.hidden(shown) if through is None else model.hidden(shown, through.cache(model, *shown.shape))
            rows = torch.arange(len(tokens), device=subject.device)[:, None]
            x_ND, targets_N = x_BTD[rows, places - 1].flatten(0, 1), tokens[rows, places].flatten()
            for x, targets in zip(x_ND.split(_CHUNK), targets_N.split(_CHUNK), strict=True):
                logits = model.logits(x)
                nats.append(F.cross_entropy(logits, targets, reduction="none").double().cpu())
                right.append((logits.argmax(dim=-1) == targets).cpu())
    return torch.cat(nats).numpy().reshape(places_BA.shape), torch.cat(right).numpy().reshape(places_BA.shape)


def _batches(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def recall_compared(figures: dict[str, Any]) -> dict[str, float]:
    """The few numbers that arms are compared by, under names for people."""
    found: dict[str, float] = {}
    for task in ("passkey", "copying"):
        for entry in figures.get(task) or []:
            found[f"{task} in {entry['length']}: share right"] = entry["accuracy"]
            found[f"{task} in {entry['length']}: nats gained"] = entry["gain"]
    if answers := figures.get("answers"):
        found["answers: share right"] = answers["accuracy"]
        found["answers: share by guessing"] = answers["chance"]
        if answers.get("newest") is not None:  # what a model gets right that always says the newest value
            found["answers: share by saying the newest value"] = answers["newest"]
        found |= {f"answers of {entry['pairs']} pairs: share right": entry["accuracy"] for entry in answers["by_pairs"]}
    return found


PROBE = Probe(measure_recall, recall_rows, _SHORT, "Recall from the context", compared=recall_compared)
