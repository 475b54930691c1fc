"""Recall: models whose recall is known to the last answer get exactly that score, and prompts are what they claim."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.evaluation.evaluate import target_nats
from harness.evaluation.probes import FLOOR, at_floor, with_floors
from harness.evaluation.probes.recall import (
    CUE,
    KEY_DIGITS,
    measure_answers,
    measure_copying,
    measure_passkey,
    measure_recall,
    recall_rows,
    scored,
)
from modeling.attention.contract import randomise
from tests.evaluation.test_perplexity import Split
from tests.support.subjects import documents, on_cpu, subject_of
from tests.support.variants import SIZES, gpt_from

END, VOCAB = 256, 257
BONUS = 3.0  # logits by which a prediction stands out
SURE, UNIFORM = math.log(1 + (VOCAB - 1) * math.exp(-BONUS)), math.log(VOCAB)  # nats of a right one, and of none
STATEMENT = len(CUE) + KEY_DIGITS + 1


class Predictor:
    """A model by its prediction: from a list of tokens the next one, or None where it says nothing."""

    position_embedding = None

    def __init__(self, predict: Callable[[list[int]], int | None], max_seq_len: int) -> None:
        self.predict, self.max_seq_len = predict, max_seq_len
        self.seen: list[list[int]] = []

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        logits_BTC = torch.zeros(*tokens_BT.shape, VOCAB)
        for row, tokens in enumerate(tokens_BT.tolist()):
            self.seen.append(tokens)
            for place in range(len(tokens)):
                if (token := self.predict(tokens[: place + 1])) is not None:
                    logits_BTC[row, place, token] = BONUS
        return logits_BTC

    def logits(self, x: Tensor) -> Tensor:
        return x


def looks_back(order: int, reach: int | None = None) -> Callable[[list[int]], int | None]:
    """What followed the last time that the last `order` tokens stood, at most `reach` tokens before what comes now."""

    def predict(tokens: list[int]) -> int | None:
        recent = tokens[-order:]
        for end in range(len(tokens) - 1, order - 1, -1):
            if reach is not None and len(tokens) - end > reach:
                return None
            if tokens[end - order : end] == recent:
                return tokens[end]
        return None

    return predict


def one(length: int, model: Any) -> dict[int, Any]:
    return {length: model}


def letters(count: int) -> Split:
    """Documents of 40 random letters."""
    random = np.random.default_rng(0)
    return documents(*random.integers(65, 91, (count // 41, 40)), end_of_text=END)


def subject(predict: Callable[[list[int]], int | None], split: Split, max_seq_len: int = 128, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "longer": lambda length: Predictor(predict, length),
        "max_tokens": 20_000,
        "decode": lambda tokens: bytes(token for token in tokens if token < 256).decode(),
    }
    return subject_of(Predictor(predict, max_seq_len), split, end_of_text=END, **(arguments | changes))


def test_a_model_that_looks_back_finds_every_key_and_gains_what_its_certainty_is_worth() -> None:
    figures = measure_recall(subject(looks_back(4), letters(4000)))
    assert figures is not None and figures["answers"] is None
    assert [entry["length"] for entry in figures["passkey"]] == [64, 128, 256]  # 32 have no room for the statement
    for entry in figures["passkey"]:
        assert (entry["accuracy"], entry["digit_accuracy"], entry["at_floor"]) == (1.0, 1.0, False)
        assert (entry["loss"], entry["unshown_loss"]) == pytest.approx((SURE, UNIFORM), rel=1e-5)
        assert entry["gain"] == pytest.approx(UNIFORM - SURE, rel=1e-5)
        assert all(prompt["right"] for prompt in entry["prompts"])


def test_guessing_digits_scores_chance_and_gains_nothing() -> None:
    random = np.random.default_rng(0)
    figures = measure_recall(subject(lambda tokens: 48 + int(random.integers(10)), letters(9000), max_tokens=100_000))
    assert figures is not None
    found = np.mean([entry["digit_accuracy"] for entry in figures["passkey"]])
    assert 0.07 < found < 0.13  # 3 lengths of 55 keys or more: a standard deviation is 0.01
    for entry in figures["passkey"]:
        assert entry["accuracy"] < 0.05
        assert (entry["chance"], entry["chance_loss"]) == pytest.approx((1e-5, math.log(10)))
    assert figures["passkey"][0]["at_floor"] and dict(recall_rows(figures))["passkey in 64"].endswith(f"; {FLOOR}")

    class Even(Predictor):
        """All digits equally likely, nothing else possible."""

        def hidden(self, tokens_BT: Tensor) -> Tensor:
            logits_BTC = torch.full((*tokens_BT.shape, VOCAB), -1e4)
            logits_BTC[..., 48:58] = 0
            return logits_BTC

    even = measure_passkey(subject(looks_back(1), letters(4000)), one(128, Even(looks_back(1), 128)))
    assert even is not None
    assert (even[0]["loss"], even[0]["gain"]) == pytest.approx((math.log(10), 0.0), abs=1e-6)


def test_a_reach_that_ends_finds_the_keys_within_it_and_no_other() -> None:
    reach = 70
    figures = measure_passkey(subject(looks_back(4), letters(4000)), one(128, Predictor(looks_back(4, reach), 128)))
    assert figures is not None
    prompts = figures[0]["prompts"]
    filler = 128 - 2 * (len(CUE) + KEY_DIGITS) - 1
    distances = [STATEMENT + filler - round(prompt["depth"] * filler) for prompt in prompts]
    assert [prompt["right"] for prompt in prompts] == [distance <= reach for distance in distances]
    assert 0.2 < figures[0]["accuracy"] < 0.9


def test_a_prompt_is_real_text_with_a_statement_at_its_depth_and_the_question_last() -> None:
    split = letters(4000)
    recorder = Predictor(looks_back(4), 128)
    figures = measure_passkey(subject(looks_back(4), split), one(128, recorder))
    assert figures is not None
    count = len(figures[0]["prompts"])
    assert count > 10 and len(recorder.seen) == 2 * count
    assert [prompt["depth"] for prompt in figures[0]["prompts"]] == pytest.approx(np.linspace(0, 1, count).tolist())
    corpus = bytes(token for token in split.tokens.tolist() if token != END).decode()
    keys = set()
    for number, (shown, unshown) in enumerate(zip(recorder.seen[:count], recorder.seen[count:], strict=True)):
        assert len(shown) == len(unshown) == 128 and shown[0] == unshown[0] == END
        text, control = bytes(shown[1:]).decode(), bytes(unshown[1:]).decode()
        before, stated, asked = text.split(CUE)
        key, after = stated[:KEY_DIGITS], stated[KEY_DIGITS + 1 :]
        assert key.isdigit() and stated[KEY_DIGITS] == "."
        assert asked == key[:-1]  # the last digit is predicted only
        assert before + after in corpus
        assert len(before) == round(number / (count - 1) * len(before + after))
        place = slice(len(before), len(before) + STATEMENT)
        assert control[: place.start] + control[place.stop :] == text[: place.start] + text[place.stop :]
        assert control[place] in corpus and len(control[place]) == STATEMENT
        keys.add(key)
    assert len(keys) > 0.9 * count


def test_copying_is_compared_with_the_same_tokens_the_first_time() -> None:
    n = 16

    def echo(tokens: list[int]) -> int | None:
        return tokens[len(tokens) - n] if len(tokens) > n else None

    recorder = Predictor(echo, 32)
    figures = measure_copying(subject(echo, letters(4000), 32), one(32, recorder))
    assert figures is not None
    assert (figures[0]["length"], figures[0]["accuracy"]) == (32, 1.0)
    assert (figures[0]["first_loss"], figures[0]["second_loss"]) == pytest.approx((UNIFORM, SURE), rel=1e-5)
    assert figures[0]["gain"] == pytest.approx(UNIFORM - SURE, rel=1e-5)
    assert len(recorder.seen) == figures[0]["copies"] > 10
    for tokens in recorder.seen:
        assert tokens[0] == END and tokens[1 : n + 1][:-1] == tokens[n + 1 :] and END not in tokens[1:]


def test_what_stands_first_in_a_copy_is_not_counted_for_nothing_says_what_comes() -> None:
    """Certain of a wrong token before both copies begin, and right where the one before has been copied."""
    n = 16

    def echo(tokens: list[int]) -> int | None:
        if len(tokens) in (1, n + 1):
            return 0  # which is in no text
        return tokens[len(tokens) - n] if len(tokens) > n else None

    figures = measure_copying(subject(echo, letters(4000), 32), one(32, Predictor(echo, 32)))
    assert figures is not None and figures[0]["accuracy"] == 1.0
    assert (figures[0]["first_loss"], figures[0]["second_loss"]) == pytest.approx((UNIFORM, SURE), rel=1e-5)


def test_a_model_that_says_nothing_copies_nothing() -> None:
    figures = measure_copying(subject(lambda tokens: None, letters(4000)), one(64, Predictor(lambda tokens: None, 64)))
    assert figures is not None
    assert (figures[0]["gain"], figures[0]["accuracy"], figures[0]["at_floor"]) == (0.0, 0.0, True)


def pairs_documents(*texts: str) -> Split:
    return documents(*(list(text.encode()) for text in texts), end_of_text=END)


def test_the_answers_of_mqar_by_pairs_and_by_distance() -> None:
    """A reach of 5 tokens. Asked for in the first line: a 2, a 4, b 4 tokens on; in the second: a 8, d 4, d 2."""
    split = pairs_documents("a1a1b2a1b2\n", "a1b2c3d4a1d4d4\n")
    figures = measure_answers(subject(looks_back(1, 5), split, 32, dataset="mqar"))
    assert figures is not None
    assert [(entry["low"], entry["high"], entry["answers"], entry["accuracy"]) for entry in figures["by_distance"]] == [
        (2, 3, 2, 1.0),
        (4, 7, 3, 1.0),
        (8, 15, 1, 0.0),
    ]
    assert [(entry["pairs"], entry["answers"], entry["accuracy"]) for entry in figures["by_pairs"]] == [
        (2, 3, 1.0),
        (4, 3, pytest.approx(2 / 3)),
    ]
    assert (figures["answers"], figures["documents"], figures["chance"], figures["exact"]) == (6, 2, 0.25, 0.5)
    assert figures["accuracy"] == pytest.approx(5 / 6)
    assert figures["loss"] == pytest.approx((5 * SURE + UNIFORM) / 6, rel=1e-5)
    assert figures["newest"] == pytest.approx(2 / 6)

    perfect = measure_answers(subject(looks_back(1), split, 32, dataset="mqar"))
    assert perfect is not None
    assert (perfect["accuracy"], perfect["exact"]) == (1.0, 1.0)


def test_the_score_that_needs_no_recall_is_that_of_a_model_which_repeats_the_newest_value() -> None:
    split = pairs_documents("a1a1b2a1b2\n", "a1b2c3d4a1d4d4\n", "a7b7a7c8b7\n")
    figures = measure_answers(subject(lambda tokens: tokens[-2] if len(tokens) > 1 else None, split, 32, dataset="mqar"))
    assert figures is not None
    # a of the third line comes after the 7 of b, which is its own value too.
    assert figures["accuracy"] == figures["newest"] == pytest.approx(3 / 8)


def test_documents_that_do_not_fit_the_window_or_ask_nothing_are_left_out() -> None:
    split = pairs_documents("a1b2c3d4d4a1c3b2\n", "a1b2\n", "a1a1\n")
    figures = measure_answers(subject(looks_back(1), split, 16, dataset="mqar"))
    assert figures is not None and (figures["documents"], figures["answers"]) == (1, 1)
    assert measure_answers(subject(looks_back(1), split, 4, dataset="mqar")) is None


def test_the_digits_of_the_passkey_corpus_are_its_answers() -> None:
    split = pairs_documents(f"abc{CUE}12345.defgh{CUE}12345", f"a{CUE}90817.{'b' * 20}{CUE}90817")
    figures = measure_recall(subject(looks_back(4, 40), split, 128, dataset="passkey"))
    assert figures is not None and figures["passkey"] is None
    answers = figures["answers"]
    # 5 + 1 + 5 + 16 = 27 tokens back in the first document, 15 more in the second.
    assert [(entry["low"], entry["accuracy"]) for entry in answers["by_distance"]] == [(16, 1.0), (32, 0.0)]
    assert (answers["exact"], answers["accuracy"], answers["chance"], answers["by_pairs"]) == (0.5, 0.5, 0.1, [])
    assert answers["newest"] is None


def test_what_cannot_be_lengthened_sees_the_same_prompts_at_its_own_lengths() -> None:
    whole = measure_recall(subject(looks_back(2), letters(4000)))
    short = measure_recall(subject(looks_back(2), letters(4000), longer=lambda length: None))
    assert whole is not None and short is not None
    assert whole["passkey"][:-1] == short["passkey"] and whole["copying"][:-1] == short["copying"]


def test_where_there_is_no_room_nothing_is_measured() -> None:
    figures = measure_recall(subject(looks_back(2), letters(4000), 16))
    assert figures is not None and figures["passkey"] is None and len(figures["copying"]) == 4
    assert measure_recall(subject(looks_back(2), letters(4000), 128, max_tokens=100)) is None
    assert measure_recall(subject(looks_back(2), letters(50), 16, dataset="mqar", max_tokens=10)) is None
    joined = subject(looks_back(2), letters(4000), encode=lambda text: [95, *text.encode()])
    assert measure_passkey(joined, {128: joined.model}) is None


@pytest.mark.parametrize("batch_size", [1, 100])
def test_the_figures_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    changed = measure_recall(subject(looks_back(4), letters(4000), batch_size=batch_size))
    assert changed == measure_recall(subject(looks_back(4), letters(4000)))


@pytest.mark.parametrize("variant", ["attention=mha", "attention=mla"])
def test_a_gpt_is_scored_as_in_the_evaluation(variant: str) -> None:
    model = randomise(gpt_from([*SIZES, "model.max_seq_len=64", variant], VOCAB)).eval()
    looked_at = subject_of(model, letters(4000), end_of_text=END, longer=lambda length: None)
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (5, 33))
    places_BA = np.array([[1, 5, 32]] * 5)
    nats_BA, right_BA = scored(looked_at, model, tokens_BT, places_BA)
    nats_BT = target_nats(on_cpu(model), tokens_BT[:, :-1], tokens_BT[:, 1:])
    np.testing.assert_allclose(nats_BA, nats_BT[:, [0, 4, 31]], rtol=1e-5)
    best_BT = model(torch.from_numpy(tokens_BT[:, :-1])).argmax(dim=-1).numpy()
    assert (right_BA == (best_BT[:, [0, 4, 31]] == tokens_BT[:, [1, 5, 32]])).all()
    assert measure_recall(looked_at) == measure_recall(looked_at)


def test_a_person_reads_what_was_found_and_what_it_was_worth() -> None:
    figures = measure_recall(subject(looks_back(4), letters(4000)))
    assert figures is not None
    rows = dict(recall_rows(figures))
    assert rows["passkey in 64"] == (
        f"100.0 % found; {SURE:.3f} nats a digit, {UNIFORM:.3f} where it was not stated: {UNIFORM - SURE:.3f} gained "
        "(a digit at random: 2.303)"
    )
    assert set(rows) == {f"passkey in {n}" for n in (64, 128, 256)} | {f"copying in {n}" for n in (32, 64, 128, 256)}
    nothing = [{**figures[task][0], "gain": -0.0004} for task in ("passkey", "copying")]
    rows = dict(recall_rows(figures | {"passkey": nothing[:1], "copying": nothing[1:]}))
    assert ": 0.000 gained (" in rows["passkey in 64"] and ": 0.000 gained; " in rows["copying in 32"]
    rows = dict(recall_rows(figures | {"passkey": None}))
    assert rows["passkey"].startswith("not measured: ") and "copying" not in rows
    asked = measure_recall(subject(looks_back(1), pairs_documents("a1b2b2a1\n"), 16, dataset="mqar"))
    assert asked is not None
    rows = dict(recall_rows(asked))
    assert "passkey" not in rows
    assert rows["answers"].startswith("100.0 % right (at random: 50.0 %, the newest value: 50.0 %), ")
    assert rows["  of 2 pairs"] == rows["  2-3 back"] == rows["  4-7 back"] == f"100.0 % right, {SURE:.3f} nats"


def test_a_share_is_above_its_floor_from_two_standard_deviations_on() -> None:
    assert at_floor(0.1, 0.1, 100) and at_floor(0.16, 0.1, 100) and not at_floor(0.161, 0.1, 100)
    assert at_floor(0.0, 0.0, 10) and not at_floor(0.01, 0.0, 10)


def test_figures_through_a_cache_are_marked_by_the_floor_of_full_precision() -> None:
    full = {"passkey": [{"length": 64, "accuracy": 0.9, "at_floor": False}, {"length": 128, "accuracy": 0.0, "at_floor": True}]}
    through = {
        "passkey": [{"length": 64, "accuracy": 0.0, "at_floor": True}, {"length": 128, "accuracy": 0.2, "at_floor": False}]
    }
    marked = with_floors({"recall": through, "beyond": None}, {"recall": full, "beyond": None})
    assert [entry["at_floor"] for entry in marked["recall"]["passkey"]] == [False, True]
    assert [entry["accuracy"] for entry in marked["recall"]["passkey"]] == [0.0, 0.2]
