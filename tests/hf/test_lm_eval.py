"""Tasks through lm-evaluation-harness: the model's answers are its own likelihoods and texts, and the figures follow.

What needs the harness itself is skipped where it is absent; it stays an extra because of its size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from harness.config.places import ROOT
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError
from harness.evaluation.evaluate import CacheChoice, evaluate_model
from harness.evaluation.perplexity import Scoring
from harness.hf.lm_eval import (
    Answers,
    Writing,
    as_language_model,
    choose_tasks,
    cut_pair,
    encode_pair,
    prompt_room,
    run_task,
    writing_of,
)
from harness.runs.load import load_trained
from modeling.attention import EXECUTION
from modeling.attention.contract import randomise
from modeling.attention.quantisation import cache_format
from modeling.generation import generate
from modeling.gpt import GPT
from scripts import downstream_eval
from tests.evaluation.test_perplexity import Split
from tests.support.micro import WORDS, Workplace, contents, json_lines
from tests.support.subjects import on_cpu
from tests.support.variants import config_at, gpt_from

CPU = torch.device("cpu")
WINDOW = 64  # of the small models

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install -r requirements.txt -r requirements-extra.txt",
)


def prose(words: int, seed: int = 0) -> str:
    choice = random.Random(seed)
    return " ".join(choice.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([prose(3000)], 300)


def answers_of(tokenizer: Tokenizer, variant: str = "mla", **changes: Any) -> Answers:
    model: GPT = randomise(gpt_from([f"attention={variant}"], tokenizer.vocab_size)).eval()
    arguments: dict[str, Any] = {"precision": torch.float32, "device": CPU, "batch_size": 3}
    return Answers(model, tokenizer, **(arguments | changes))


def with_batches_of(answers: Answers, batch_size: int) -> Answers:
    return Answers(answers.model, answers.tokenizer, precision=answers.precision, device=CPU, batch_size=batch_size)


@torch.no_grad()
def by_hand(model: GPT, tokens: Sequence[int], scored: int) -> tuple[float, bool]:
    """log p of the last `scored` tokens in one pass over all before them, and whether each is the likeliest."""
    logits_TC = model(torch.tensor([tokens[:-1]]))[0, -scored:].double()
    targets_T = torch.tensor(tokens[-scored:])
    chosen_T = logits_TC.log_softmax(dim=-1).gather(1, targets_T[:, None])
    return float(chosen_T.sum()), bool((logits_TC.argmax(dim=-1) == targets_T).all())


def written_by_hand(answers: Answers, context: str, new_tokens: int) -> list[int]:
    """Greedy tokens behind a context, one prompt alone, up to an end of text."""
    tokenizer = answers.tokenizer
    prompt = (tokenizer.encode(context) or [tokenizer.end_of_text])[new_tokens - WINDOW :]
    tokens = (int(token) for token in generate(answers.model, [prompt], max_new_tokens=new_tokens, temperature=0))
    return list(itertools.takewhile(lambda token: token != tokenizer.end_of_text, tokens))


# --- likelihoods -----------------------------------------------------------------------------------------------------


def test_a_continuations_likelihood_is_the_sum_of_its_tokens_behind_the_context(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer)
    pairs = [(prose(1 + n % 20, n), " " + prose(1 + n % 5, n + 100)) for n in range(12)]
    for (context, continuation), found in zip(pairs, answers.log_likelihoods(pairs), strict=True):
        before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        assert whole[: len(before)] == before and len(whole) <= WINDOW
        expected = by_hand(answers.model, whole, len(whole) - len(before))
        assert found == (pytest.approx(expected[0], rel=1e-5), expected[1])


def test_a_long_context_loses_its_beginning_and_the_continuation_stays_whole(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer)
    context, continuation = prose(300), " " + prose(8, 1)
    whole = tokenizer.encode(context + continuation)
    scored = len(whole) - len(tokenizer.encode(context))
    assert len(whole) > 2 * WINDOW and 1 < scored < WINDOW
    (found,) = answers.log_likelihoods([(context, continuation)])
    assert found[0] == pytest.approx(by_hand(answers.model, whole[-WINDOW - 1 :], scored)[0], rel=1e-5)


def test_a_continuation_longer_than_the_window_is_scored_in_windows_behind_the_contexts_last_token(
    tokenizer: Tokenizer,
) -> None:
    answers = answers_of(tokenizer)
    context, continuation = prose(30), " " + prose(150, 1)
    before, after = encode_pair(tokenizer, context, continuation)
    assert 2 * WINDOW < len(after) < 3 * WINDOW
    tokens = [before[-1], *after]
    parts = [by_hand(answers.model, tokens[start : start + WINDOW + 1], WINDOW)[0] for start in (0, WINDOW)]
    last = by_hand(answers.model, tokens[-WINDOW - 1 :], len(after) - 2 * WINDOW)[0]
    (found,) = answers.log_likelihoods([(context, continuation)])
    assert found == (pytest.approx(sum(parts) + last, rel=1e-5), False)


def test_every_token_of_a_continuation_is_scored_once_with_all_the_context_that_fits() -> None:
    for context, continuation in itertools.product(range(1, 12), range(14)):
        before, after = list(range(context)), list(range(100, 100 + continuation))
        windows = list(cut_pair(before, after, 5))
        assert [token for _, targets in windows for token in targets] == after
        for inputs, targets in windows:
            assert 1 <= len(targets) <= len(inputs) <= 5
            whole = before + after
            end = whole.index(targets[-1])
            assert list(inputs) == whole[end - len(inputs) : end]
            assert len(inputs) == 5 or len(inputs) == context + continuation - 1


def test_an_empty_context_is_an_end_of_text(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer)
    tokens = tokenizer.encode("the whale")
    expected = by_hand(answers.model, [tokenizer.end_of_text, *tokens], len(tokens))
    assert answers.log_likelihoods([("", "the whale")])[0][0] == pytest.approx(expected[0], rel=1e-5)
    assert encode_pair(tokenizer, "", "the whale") == ([tokenizer.end_of_text], tokens)
    assert encode_pair(tokenizer, "  ", "whale") == ([tokenizer.end_of_text], tokenizer.encode("  whale"))


def test_nothing_is_certain_to_follow(tokenizer: Tokenizer) -> None:
    assert answers_of(tokenizer).log_likelihoods([("the sea", ""), ("", "")]) == [(0.0, True)] * 2
    assert answers_of(tokenizer).log_likelihoods([]) == []


def test_spaces_between_belong_to_the_continuation_and_words_that_melt_are_cut_apart(tokenizer: Tokenizer) -> None:
    assert encode_pair(tokenizer, "the sea ", "saw") == encode_pair(tokenizer, "the sea", " saw")
    before, after = encode_pair(tokenizer, "the sea \n", "saw")
    assert (tokenizer.decode(before), tokenizer.decode(after)) == ("the sea", " \nsaw")
    melted = next(
        (word[:cut], word[cut:])
        for word in WORDS
        for cut in range(1, len(word))
        if len(tokenizer.encode(word)) <= len(tokenizer.encode(word[:cut]))
    )
    assert encode_pair(tokenizer, *melted) == (tokenizer.encode(melted[0]), tokenizer.encode(melted[1]))


def test_what_the_model_writes_itself_is_greedy_and_nothing_else_is(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer)
    prompts = [tokenizer.encode(prose(words, words)) for words in (2, 9)]
    pairs, expected = [], []
    for prompt in prompts:
        own = [int(token) for token in generate(answers.model, [prompt], max_new_tokens=5, temperature=0)]
        for place in range(5):
            other = [*own]
            other[place] = (own[place] + 1) % tokenizer.vocab_size
            pairs.append((prompt, other))
            expected.append(False)
        pairs.append((prompt, own))
        expected.append(True)
    assert [greedy for _, greedy in answers._score(pairs)] == expected


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_answers_do_not_depend_on_the_batch_size(tokenizer: Tokenizer, batch_size: int) -> None:
    answers = answers_of(tokenizer)
    pairs = [(prose(n * n % 41, n), " " + prose(1 + n * n % 61, n + 50)) for n in range(14)]
    found = with_batches_of(answers, batch_size).log_likelihoods(pairs)
    for (one, greedy), (other, other_greedy) in zip(answers.log_likelihoods(pairs), found, strict=True):
        assert one == pytest.approx(other, rel=1e-5) and greedy == other_greedy
    contexts, writing = [context for context, _ in pairs], Writing(("e",), 12, 0.0, None, None)
    assert with_batches_of(answers, batch_size).continuations(contexts, writing) == answers.continuations(contexts, writing)


# --- whole texts, against our own evaluation -------------------------------------------------------------------------


def split_of(documents: Sequence[Sequence[int]]) -> Split:
    sizes = np.array([len(document) for document in documents])
    return Split(np.concatenate(documents).astype(np.uint16), np.cumsum([0, *sizes]), sizes, sizes)


def nats_of_ours(answers: Answers, documents: Sequence[Sequence[int]]) -> float:
    return evaluate_model(
        on_cpu(answers.model), split_of(documents), answers.tokenizer, Scoring(1.0, batch_size=2, per_document=True)
    ).nats


@pytest.mark.parametrize("words", [1, 20, 60, 120, 400])
def test_a_texts_likelihood_is_our_own_evaluations_per_document_a_whole_window_apart(tokenizer: Tokenizer, words: int) -> None:
    answers = answers_of(tokenizer)
    text = prose(words, words)
    (found,) = answers.rolling([text])
    assert -found == pytest.approx(nats_of_ours(answers, [tokenizer.encode(text)]), rel=1e-5)


def test_a_corpus_of_texts_is_the_sum_of_them(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer, "mha")
    texts = [prose(words, words) for words in (3, 130, 40, 7, 77)]
    ours = nats_of_ours(answers, [tokenizer.encode(text) for text in texts])
    assert -sum(answers.rolling(texts)) == pytest.approx(ours, rel=1e-5)
    assert answers.rolling([*texts, ""])[-1] == 0


def test_the_end_of_text_behind_a_document_is_all_that_our_evaluation_adds_within_one_window(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer)
    text = prose(20)
    tokens = [*tokenizer.encode(text), tokenizer.end_of_text]
    assert len(tokens) <= WINDOW
    end = by_hand(answers.model, [tokenizer.end_of_text, *tokens], 1)[0]
    assert -answers.rolling([text])[0] - end == pytest.approx(nats_of_ours(answers, [tokens]), rel=1e-5)


# --- texts that are written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gqa", "mla", "mha_learned"])
def test_texts_of_unlike_prompts_are_what_each_prompt_alone_gives(tokenizer: Tokenizer, variant: str) -> None:
    answers = answers_of(tokenizer, variant)
    contexts = ["", *(prose(words, words) for words in (1, 4, 11, 90, 200))]
    found = answers.continuations(contexts, Writing((), 30, 0.0, None, None))
    expected = [tokenizer.decode(written_by_hand(answers, context, 30)) for context in contexts]
    assert found == expected and len(set(found)) > 3


def test_a_text_ends_before_the_first_stop_even_one_that_lies_across_tokens(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer)
    context = prose(6)
    tokens = written_by_hand(answers, context, 40)
    whole = tokenizer.decode(tokens)
    across = next(
        stop
        for place in range(3, len(whole) - 4)
        for stop in [whole[place : place + 3]]
        if "\N{REPLACEMENT CHARACTER}" not in stop
        and stop not in [tokenizer.decode([token]) for token in tokens]
        and whole.find(stop[1:]) == whole.find(stop) + 1
    )
    stops = (whole[-2:], across[1:], across)  # the last two are complete at the same token
    (found,) = answers.continuations([context], Writing(stops, 40, 0.0, None, None))
    assert found == whole[: whole.find(across)] and 0 < len(found) < whole.find(whole[-2:])


def test_a_text_ends_with_the_end_of_text_and_after_max_new_tokens(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer)
    contexts = [prose(1 + seed % 9, seed) for seed in range(40)]
    raw = [
        [int(token) for token in generate(answers.model, [tokenizer.encode(context)], max_new_tokens=30, temperature=0)]
        for context in contexts
    ]
    ended = [tokenizer.end_of_text in tokens for tokens in raw]
    assert any(ended) and not all(ended)
    expected = [
        tokenizer.decode(list(itertools.takewhile(lambda token: token != tokenizer.end_of_text, tokens))) for tokens in raw
    ]
    assert answers.continuations(contexts, Writing((), 30, 0.0, None, None)) == expected


def test_sampled_texts_repeat_themselves_and_differ_from_greedy_ones(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer)
    contexts, sampling = [prose(5, seed) for seed in range(5)], Writing((), 20, 3.0, None, None)
    drawn = answers.continuations(contexts, sampling)
    assert drawn == answers.continuations(contexts, sampling)
    assert drawn != answers.continuations(contexts, Writing((), 20, 0.0, None, None))
    only_one = answers.continuations(contexts, Writing((), 20, 3.0, 1, None))
    assert only_one == answers.continuations(contexts, Writing((), 20, 0.0, None, None))


def test_bfloat16_gives_nearly_the_same_likelihoods_and_writes(tokenizer: Tokenizer) -> None:
    pairs = [(prose(12, seed), " " + prose(9, seed + 9)) for seed in range(6)]
    exact = answers_of(tokenizer).log_likelihoods(pairs)
    rounded = answers_of(tokenizer, precision=torch.bfloat16)
    found = rounded.log_likelihoods(pairs)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in exact], rel=0.05)
    assert found != exact
    assert len(rounded.continuations([prose(5)], Writing((), 5, 0.0, None, None))[0]) > 0


# --- through a cache -------------------------------------------------------------------------------------------------

THROUGH = {
    "int8": CacheChoice(cache_format("int8")),
    "int4_rotated": CacheChoice(cache_format("int4_rotated")),
    "window": CacheChoice(torch.float32, window=9, sinks=2),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", THROUGH)
@pytest.mark.parametrize("variant", ["gqa", "mla", "gdn_3_1"])
def test_through_a_cache_answers_are_those_of_decoding_token_by_token(tokenizer: Tokenizer, variant: str, kind: str) -> None:
    choice, plain = THROUGH[kind], answers_of(tokenizer, variant)
    if choice.window is not None and variant == "gdn_3_1":
        with pytest.raises(UserError, match="window=9 would hide tokens that state, tail of GatedDeltaNet holds"):
            answers_of(tokenizer, variant, through=choice)
        return
    answers = answers_of(tokenizer, variant, through=choice)
    pairs = [(prose(2 + 5 * seed, seed), " " + prose(3, seed + 9)) for seed in range(3)]  # of three lengths, one batch
    found = answers.log_likelihoods(pairs)
    for (before, after), (nats, _) in zip([encode_pair(tokenizer, *pair) for pair in pairs], found, strict=True):
        tokens = [*before, *after]
        assert len(tokens) <= WINDOW
        cache = choice.cache(answers.model, 1, len(tokens))
        logits_TC = torch.cat([answers.model(torch.tensor([[token]]), cache)[0] for token in tokens[:-1]])[-len(after) :]
        chosen_T = logits_TC.double().log_softmax(dim=-1).gather(1, torch.tensor(after)[:, None])
        assert nats == pytest.approx(float(chosen_T.sum()), rel=2e-4)
    assert [nats for nats, _ in found] != pytest.approx([nats for nats, _ in plain.log_likelihoods(pairs)], rel=1e-4)

    contexts, writing = [prose(20, 3), prose(4, 4)], Writing((), 30, 0.0, None, None)
    for context, text in zip(contexts, answers.continuations(contexts, writing), strict=True):
        settings: dict[str, Any] = {"cache_dtype": choice.dtype, "window": choice.window, "sinks": choice.sinks}
        prompt = tokenizer.encode(context)[30 - WINDOW :]
        written = generate(answers.model, [prompt], max_new_tokens=30, temperature=0, **settings)
        kept = itertools.takewhile(lambda token: token != tokenizer.end_of_text, map(int, written))
        assert text == tokenizer.decode(list(kept))
    assert answers.continuations(contexts, writing) != plain.continuations(contexts, writing)


@pytest.mark.parametrize(
    ("settings", "writing"),
    [
        ({}, Writing((), 256, 0.0, None, None)),
        ({"until": "\n", "max_gen_toks": 32, "do_sample": False}, Writing(("\n",), 32, 0.0, None, None)),
        ({"until": ["\n\n", "", "."], "max_new_tokens": 8}, Writing(("\n\n", "."), 8, 0.0, None, None)),
        ({"until": None, "temperature": 0.7, "top_p": 0.9}, Writing((), 256, 0.7, None, 0.9)),
        ({"temperature": 0.7, "do_sample": False}, Writing((), 256, 0.0, None, None)),
        ({"do_sample": True, "top_k": 5, "num_beams": 1}, Writing((), 256, 1.0, 5, None)),
        ({"do_sample": True, "temperature": 0.0, "max_gen_toks": 4, "max_tokens": 9}, Writing((), 4, 0.0, None, None)),
    ],
)
def test_a_tasks_settings_mean_what_they_mean_to_the_harness(settings: dict[str, Any], writing: Writing) -> None:
    assert writing_of(settings) == writing
    if importlib.util.find_spec("lm_eval") is not None:
        from lm_eval.models.utils import normalize_gen_kwargs

        theirs = normalize_gen_kwargs(settings)
        assert (theirs["max_gen_toks"], theirs["do_sample"]) == (
            writing.max_new_tokens,
            settings.get("do_sample", writing.temperature > 0),
        )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_beams": 4}, r"generation_kwargs.num_beams is not 1"),
        ({"repetition_penalty": 1.2}, r"generation_kwargs.repetition_penalty is not supported; until, do_sample"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        writing_of(settings)


def test_what_cannot_be_answered_is_refused(tokenizer: Tokenizer) -> None:
    answers = answers_of(tokenizer)
    with pytest.raises(UserError, match=r"writes up to 64 new tokens and the model has 64 positions"):
        answers.continuations(["the sea"], Writing((), WINDOW, 0.0, None, None))
    assert prompt_room(Writing((), WINDOW - 1, 0.0, None, None), WINDOW) == 1
    with pytest.raises(UserError, match=r"generation_kwargs do not fit: top_p=2.0 must be in \(0, 1\]"):
        answers.continuations(["the sea"], Writing((), 3, 1.0, None, 2.0))


# --- the harness itself ----------------------------------------------------------------------------------------------


class Request:
    """What the harness hands over: arguments, and whatever else it likes."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@needs_harness
def test_pairs_are_cut_as_the_harness_cuts_them(tokenizer: Tokenizer) -> None:
    from lm_eval.api.model import TemplateLM

    theirs: Any = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    compared = 0
    for seed in range(60):
        context = prose(1 + seed % 7, seed)[: -1 - seed % 3 or None] + ["", " ", "\n", "  \n "][seed % 4]
        continuation = [" ", "", "e"][seed % 3] + prose(1 + seed % 4, seed + 1)
        if not context.strip():
            continue
        expected = TemplateLM._encode_pair(theirs, context, continuation)
        if expected[1]:  # where the two melt into one token, the harness's own models fail
            assert encode_pair(tokenizer, context, continuation) == expected
            compared += 1
    assert compared > 40


@needs_harness
@pytest.mark.parametrize("variant", ["gqa", "mla"])
def test_answers_are_those_of_the_harnesss_own_model_with_the_same_weights(tokenizer: Tokenizer, variant: str) -> None:
    pytest.importorskip("accelerate", reason="the harness's own model needs it: pip install accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from harness.hf.classes import as_transformers

    answers = answers_of(tokenizer, variant)
    theirs = as_transformers(answers.model, config_at(f"attention={variant}"))
    theirs.generation_config.eos_token_id = tokenizer.end_of_text
    their_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend, eos_token="<|endoftext|>")
    other = HFLM(pretrained=theirs, tokenizer=their_tokenizer, backend="causal", batch_size=4, max_length=WINDOW, device="cpu")
    ours = as_language_model(answers)

    pairs = [
        (prose(1 + seed * 7 % 90, seed) + ["", " ", "\n"][seed % 3], " " * (seed % 2) + prose(1 + seed % 9, seed + 9))
        for seed in range(24)
    ]
    requests: list[Any] = [Request(*pair) for pair in [*pairs, ("", "the sea")]]
    for found, expected in zip(ours.loglikelihood(requests), other.loglikelihood(requests), strict=True):
        assert found == (pytest.approx(expected[0], rel=1e-5), expected[1])
    requests = [Request(prose(words, words)) for words in (1, 60, 200, 500)]
    assert ours.loglikelihood_rolling(requests) == pytest.approx(other.loglikelihood_rolling(requests), rel=1e-5)
    settings = [{"until": [], "max_gen_toks": 30}, {"until": ["e", "\n"], "max_gen_toks": 20, "do_sample": False}]
    requests = [Request(prose(1 + 9 * seed, seed), settings[seed % 2]) for seed in range(10)]
    assert ours.generate_until(requests) == other.generate_until(requests)


CHOICES = ["sea", "whale and storm", "captain"]
TEXTS = ["the sea saw a whale", "a captain said of, and a storm " * 9, "island"]
NEW_TOKENS = 8


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
    """A task of one's own: a YAML file, and the documents beside it."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "test_split": "test",
        "metadata": {"version": 1.0},
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A finished run, bytes in a window of 32."""
    place = Workplace(tmp_path_factory.mktemp("tasks"))
    place.train("mla", "attention=mla", "budget.steps=30")
    return place


@pytest.fixture(scope="module")
def answers(place: Workplace) -> Answers:
    trained = load_trained(place.runs / "mla", device=CPU, precision=torch.float32, execution=EXECUTION)
    return Answers(trained.model, trained.tokenizer, precision=torch.float32, device=CPU, batch_size=2)


@pytest.fixture(scope="module")
def task_dir(place: Workplace, answers: Answers) -> Path:
    """`chosen`: three questions, of which the model has the first two right; `read`; `written`: the first of two right."""
    folder = place.folder / "my tasks"
    folder.mkdir()
    questions = [{"query": prose(3, seed), "choices": CHOICES} for seed in range(3)]
    for number, question in enumerate(questions):
        pairs = [(str(question["query"]), f" {choice}") for choice in CHOICES]
        likeliest = int(np.argmax([nats for nats, _ in answers.log_likelihoods(pairs)]))
        question["gold"] = likeliest if number < 2 else (likeliest + 1) % len(CHOICES)
    write_task(
        folder,
        "chosen",
        questions,
        output_type="multiple_choice",
        doc_to_text="{{query}}",
        doc_to_choice="choices",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    write_task(
        folder,
        "read",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    )
    prompts = [prose(3, seed) for seed in (5, 6)]
    own = answers.tokenizer.decode(
        [
            int(token)
            for token in generate(
                answers.model,
                [answers.tokenizer.encode(prompts[0])[NEW_TOKENS - 32 :]],
                max_new_tokens=NEW_TOKENS,
                temperature=0,
            )
        ]
    )
    documents = [{"query": prompts[0], "answer": own}, {"query": prompts[1], "answer": "Moby"}]
    write_task(
        folder,
        "written",
        documents,
        output_type="generate_until",
        doc_to_text="{{query}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n\n\n"], "max_gen_toks": NEW_TOKENS},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    write_task(
        folder,
        "too_long",
        documents,
        output_type="generate_until",
        doc_to_text="{{query}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 32},
    )
    write_task(
        folder, "unsafe", documents, output_type="generate_until", doc_to_text="", doc_to_target="answer", unsafe_code=True
    )
    write_task(
        folder,
        "elsewhere",
        documents,
        output_type="generate_until",
        doc_to_text="",
        doc_to_target="answer",
        dataset_path="allenai/ai2_arc",
        dataset_kwargs={},
    )
    write_task(folder, "broken", documents, output_type="guess_until", doc_to_text="", doc_to_target="answer")
    (folder / "mine.yaml").write_text("group: mine\ntask:\n  - chosen\n  - unsafe\n", encoding="utf-8")
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to find or reach another machine fails the test."""

    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"the network was asked for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module", autouse=True)
def one_index() -> Iterator[None]:
    """The harness's own 14,000 tasks are read once: that takes seconds."""
    with pytest.MonkeyPatch.context() as patched:
        if importlib.util.find_spec("lm_eval") is not None:
            tasks = importlib.import_module("lm_eval.tasks")
            patched.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))
        yield


def command(place: Workplace, task_dir: Path, *options: str) -> int:
    return downstream_eval.main(
        [f"runs_dir={place.runs}", "run=mla", "device=cpu", "precision=float32", f"task_dir={task_dir}", *options]
    )


@needs_harness
@pytest.mark.usefixtures("no_network")
def test_the_three_kinds_of_task_give_the_models_own_figures_without_a_network(task_dir: Path, answers: Answers) -> None:
    chosen, read, written = choose_tasks(["chosen", "read", "written"], task_dir)
    rows = {row["metric"]: row for row in run_task(chosen, answers)["metrics"]}
    assert rows["acc"]["value"] == pytest.approx(2 / 3)
    assert (rows["acc"]["documents"], rows["acc"]["num_fewshot"], rows["acc"]["higher_is_better"]) == (3, 0, True)
    assert rows["acc"]["stderr"] == pytest.approx((2 / 3 * 1 / 3 / 2) ** 0.5)
    per_byte = [
        max(range(3), key=lambda gold, pairs=pairs: answers.log_likelihoods(pairs)[gold][0] / len(CHOICES[gold]))
        for pairs in ([(document["query"], f" {choice}") for choice in CHOICES] for document in documents(task_dir))
    ]
    right = [gold == document["gold"] for gold, document in zip(per_byte, documents(task_dir), strict=True)]
    assert rows["acc_norm"]["value"] == pytest.approx(np.mean(right))

    rows = {row["metric"]: row for row in run_task(read, answers)["metrics"]}
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    nats = nats_of_ours(answers, [answers.tokenizer.encode(text) for text in TEXTS])
    assert max(len(text) for text in TEXTS) > 8 * answers.model.max_seq_len
    assert rows["bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / text_bytes, rel=1e-5)
    assert rows["byte_perplexity"]["value"] == pytest.approx(np.exp(nats / text_bytes), rel=1e-5)
    assert rows["bits_per_byte"]["higher_is_better"] is False

    (row,) = run_task(written, answers)["metrics"]
    assert (row["task"], row["metric"], row["value"], row["documents"]) == ("written", "exact_match", 0.5, 2)


def documents(task_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (task_dir / "chosen.jsonl").read_text().splitlines()]


@needs_harness
def test_the_command_prints_a_table_and_one_json_line_and_keeps_a_record_of_each_task(
    place: Workplace, task_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place.runs)
    capsys.readouterr()
    assert command(place, task_dir, "tasks=chosen,read") == 0
    said = capsys.readouterr().out
    (line,) = json_lines(said)
    assert said.rstrip().splitlines()[-1].startswith("{")
    assert [row.split()[:3] for row in said.splitlines()[:3]] == [
        ["task", "metric", "value"],
        ["chosen", "acc", "0.6667"],
        ["chosen", "acc_norm", f"{line['records'][0]['metrics'][1]['value']:.4f}"],
    ]
    new = {name: json.loads(data) for name, data in contents(place.runs).items() if name not in before}
    assert {name.rpartition("-")[0] for name in new} == {"mla/downstream/chosen", "mla/downstream/read"}
    assert [record for _, record in sorted(new.items())] == line["records"]
    record = line["records"][0]
    assert (record["name"], record["attention"], record["steps"], record["precision"]) == ("mla", "mla", 30, "float32")
    assert [record["decode"] for record in line["records"]] == [None, None], "likelihoods are computed without a cache"
    assert contents(place.runs).items() >= before.items()

    files = set(contents(place.runs))
    assert command(place, task_dir, "tasks=chosen", "batch_size=1") == 0
    assert set(contents(place.runs)) == files, "the same task done again replaces its record"
    capsys.readouterr()
    assert command(place, task_dir, "tasks=chosen", "limit=2") == 0
    said = capsys.readouterr().out
    (limited,) = json_lines(said)[0]["records"]
    assert limited["metrics"][0]["documents"] == 2 and limited["metrics"][0]["value"] == 1
    assert limited["fingerprint"] != record["fingerprint"]
    assert "only the first 2 documents of each task: a try, not a result" in said
    assert len(set(contents(place.runs)) - files) == 1, "another one stands beside it"

    files = set(contents(place.runs))
    assert command(place, task_dir, "tasks=chosen,written", "cache.dtype=int4") == 0
    said = capsys.readouterr().out
    for coarse in json_lines(said)[0]["records"]:
        assert (coarse["cache_dtype"], coarse["cache_window"], coarse["cache_sinks"]) == ("int4", None, 0)
        assert coarse["decode"].startswith("absorbed")
    assert "scored and written through a cache of int4; absorbed" in said
    assert record["cache_dtype"] is None
    assert len(set(contents(place.runs)) - files) == 2, "and one through a cache beside both"
    with pytest.raises(UserError, match=r"cache.window=33 is longer than the context, model.max_seq_len=32: choose a shorter"):
        command(place, task_dir, "tasks=chosen", "cache.window=33")


@needs_harness
def test_examples_in_the_prompt_make_it_another_question(task_dir: Path, answers: Answers) -> None:
    (task,) = choose_tasks(["chosen"], task_dir)
    plain = run_task(task, answers)
    (task,) = choose_tasks(["chosen"], task_dir)
    shown = run_task(task, answers, num_fewshot=1)
    assert shown["metrics"][0]["num_fewshot"] == 1
    assert shown["fingerprint"] != plain["fingerprint"]
    (task,) = choose_tasks(["chosen"], task_dir)
    assert run_task(task, answers)["fingerprint"] == plain["fingerprint"]


@needs_harness
@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("tasks=helaswag", r"helaswag is no task of lm-evaluation-harness or .*; did you mean hellaswag or "),
        ("tasks=qqqqqqqqqqq", r"qqqqqqqqqqq is no task .*; `lm-eval ls tasks` lists all that there are"),
        ("tasks=chosen,unsafe", r"the task unsafe runs the programs that a model writes"),
        ("tasks=mine", r"the task unsafe runs the programs that a model writes"),
        ("tasks=broken", r"the task broken cannot be loaded \(\w+: .*\): mend its files"),
        ("tasks=too_long", r"writes up to 32 new tokens and the model has 32 positions"),
        ("task_dir=nowhere", r"task_dir=.*nowhere is no folder"),
    ],
)
def test_tasks_that_cannot_be_done_are_refused_in_one_sentence(
    place: Workplace, task_dir: Path, option: str, sentence: str
) -> None:
    before = contents(place.runs)
    with pytest.raises(UserError, match=sentence) as refused:
        command(place, task_dir, *(["tasks=chosen"] if "task_dir" in option else []), option)
    assert len(str(refused.value).splitlines()) == 1
    assert contents(place.runs) == before


@needs_harness
def test_a_task_whose_data_is_nowhere_is_one_sentence(place: Workplace, task_dir: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    shown = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "downstream_eval.py"),
            f"runs_dir={place.runs}",
            "tasks=elsewhere",
            f"task_dir={task_dir}",
        ],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert (shown.returncode, shown.stdout) == (2, "")
    (said,) = [line for line in shown.stderr.splitlines() if line.startswith("error: ")]
    assert "the data of the task elsewhere is not on this machine" in said and "copy a cache" in said
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("tasks=", r"no task is named: give tasks=hellaswag,arc_easy"),
        ("limit=0", r"limit=0 must be 1 or more"),
        ("num_fewshot=-1", r"num_fewshot=-1 must be 0 or more"),
        ("batch_size=0", r"batch_size=0 must be 1 or more"),
        ("limit=0.5", r"limit=0.5 must be "),
        ("run=mlaa", r"run=mlaa is no run .*did you mean mla\?"),
        ("device=gpu", r"device=gpu is unknown"),
        ("precision=half", r"precision=half is unknown"),
        ("cache.sinks=2", r"cache.sinks=2 stay visible beside a window: set cache.window too"),
        ("cache.dtype=int3", r"int3 is unknown; choose one of float32"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_sentence(place: Workplace, option: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        downstream_eval.main([f"runs_dir={place.runs}", "tasks=chosen", option])


def test_without_the_harness_the_command_says_how_to_get_it(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"which is not installed: pip install -r requirements.txt -r requirements-extra"):
        downstream_eval.main([f"runs_dir={place.runs}", "tasks=hellaswag", "device=cpu"])
