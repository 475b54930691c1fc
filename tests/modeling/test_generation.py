"""Generation: greedy equals repeated full forwards, sampling follows the distribution it states, refusals in one sentence."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.attention import attends
from modeling.attention.contract import randomise
from modeling.generation import decode_step, generate, sample
from modeling.gpt import GPT
from tests.support.variants import SHIPPED, gpt_from

VOCAB, DRAWS = 100, 40_000


def model_of(variant: str, **changes: Any) -> GPT:
    model: GPT = randomise(gpt_from([f"attention={variant}"], VOCAB, **changes))
    return model


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def written(model: GPT, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """New tokens of every row."""
    return torch.stack(list(generate(model, prompts, **settings)), dim=1).tolist()


@torch.no_grad()
def greedy_by_full_forwards(model: GPT, prompt: list[int], new_tokens: int) -> list[int]:
    model.eval()
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SHIPPED)
def test_greedy_generation_is_the_argmax_of_repeated_full_forwards(variant: str) -> None:
    model, prompt = model_of(variant), random_prompt(7)
    wanted = greedy_by_full_forwards(model, prompt, 15)
    assert len(set(wanted)) > 2  # a model that repeats itself would prove little
    assert written(model, [prompt], max_new_tokens=15, temperature=0) == [wanted]


@pytest.mark.parametrize("variant", SHIPPED)
def test_prompts_of_unequal_length_give_each_row_what_it_gives_alone(variant: str) -> None:
    model = model_of(variant)
    prompts = [random_prompt(length, seed=length) for length in (3, 11, 1, 7)]
    together = written(model, prompts, max_new_tokens=10, temperature=0)
    assert together == [greedy_by_full_forwards(model, prompt, 10) for prompt in prompts]


def test_generation_may_fill_the_last_position_of_the_model() -> None:
    for variant in ("mha", "mla_plain"):
        model, prompt = model_of(variant), random_prompt(60)
        rows = written(model, [prompt], max_new_tokens=5, temperature=0)  # the fifth is never fed back
        assert rows == [greedy_by_full_forwards(model, prompt, 5)]


def test_tokens_are_yielded_one_by_one_and_only_as_many_as_asked_for() -> None:
    stream = generate(model_of("mla"), [[1, 2], [3, 4]], max_new_tokens=3, temperature=0)
    first = next(stream)
    assert first.shape == (2,) and first.dtype == torch.long
    assert len(list(stream)) == 2


def test_generation_uses_no_dropout_and_keeps_no_gradient() -> None:
    model = model_of("mla", dropout=0.5).train()
    rows = written(model, [random_prompt(7)], max_new_tokens=8, temperature=0)
    assert rows == written(model_of("mla"), [random_prompt(7)], max_new_tokens=8, temperature=0)
    assert not any(token.requires_grad for token in generate(model, [[1]], max_new_tokens=2))


def test_the_cache_may_be_narrower_than_the_model() -> None:
    """With bfloat16 keys and values the first token, computed from the prompt, rarely differs; all are real tokens."""
    model, prompts = model_of("mla"), [random_prompt(9), random_prompt(4)]
    low = written(model, prompts, max_new_tokens=12, temperature=0, cache_dtype=torch.bfloat16)
    assert all(0 <= token < VOCAB for row in low for token in row)
    assert [row[0] for row in low] == [row[0] for row in written(model, prompts, max_new_tokens=1, temperature=0)]


# --- distributions ---------------------------------------------------------------------------------------------------

P = [0.4, 0.3, 0.15, 0.1, 0.05]


def frequencies(probabilities: list[float], **settings: Any) -> list[float]:
    """How often each token is drawn from these probabilities, in DRAWS draws."""
    arguments: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    logits = torch.tensor(probabilities).log().expand(DRAWS, -1)
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **arguments)
    counts: list[int] = drawn.bincount(minlength=len(probabilities)).tolist()
    return [count / DRAWS for count in counts]


def normalised(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, P),
        ({"temperature": 0.5}, normalised([p**2 for p in P])),
        ({"temperature": 2.0}, normalised([p**0.5 for p in P])),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, normalised([0.4, 0.3, 0, 0, 0])),
        ({"top_k": 5}, P),
        ({"top_k": 99}, P),
        ({"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.39}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.41}, normalised([0.4, 0.3, 0, 0, 0])),
        ({"top_p": 0.69}, normalised([0.4, 0.3, 0, 0, 0])),
        ({"top_p": 0.8}, normalised([0.4, 0.3, 0.15, 0, 0])),
        ({"top_p": 1.0}, P),
        ({"top_k": 3, "top_p": 0.7}, normalised([0.4, 0.3, 0, 0, 0])),  # of 0.85 that top_k leaves: 0.47, 0.82
        ({"top_k": 3, "top_p": 0.83}, normalised([0.4, 0.3, 0.15, 0, 0])),
        ({"temperature": 2.0, "top_p": 0.5}, normalised([0.4**0.5, 0.3**0.5, 0, 0, 0])),  # flattened first: 0.31, 0.57
        # Flattened first 0.30, 0.56, 0.74: cut before that, two tokens would be left.
        ({"temperature": 2.0, "top_p": 0.6}, normalised([0.4**0.5, 0.3**0.5, 0.15**0.5, 0, 0])),
        ({"temperature": 0.5, "top_k": 2}, normalised([0.16, 0.09, 0, 0, 0])),
    ],
    ids=str,
)
def test_samples_follow_the_distribution_computed_by_hand(settings: dict[str, Any], wanted: list[float]) -> None:
    for turn in (0, 2):  # the likeliest token stands first, then elsewhere
        turned = P[turn:] + P[:turn]
        got = frequencies(turned, **settings)
        for token, probability in enumerate(wanted[turn:] + wanted[:turn]):
            error = 4.5 * (probability * (1 - probability) / DRAWS) ** 0.5
            assert abs(got[token] - probability) <= error, (token, got)


def test_a_top_p_of_one_keeps_even_the_tokens_that_rounded_sums_do_not_reach() -> None:
    """25,000 tokens hold half of the mass; in float32 the sum is 1 before the last 1,000 of small ones."""
    logits = torch.cat((torch.zeros(25_000), torch.full((25_000,), -18.0)))
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    probability = logits.softmax(dim=-1)
    assert (cumulative - probability >= 1).any()
    drawn: list[Tensor] = []

    def all_of_it(weights: Tensor, *arguments: Any, **options: Any) -> Tensor:
        drawn.append(weights)
        return torch.zeros(len(weights), 1, dtype=torch.long)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", all_of_it)
        sample(logits[None], temperature=1.0, top_k=None, top_p=1.0, generator=None)
    assert (drawn[0] > 0).all()


def test_temperature_zero_takes_the_likeliest_token_of_each_row() -> None:
    logits = torch.tensor([[0.1, 0.3, 0.2], [5.0, 4.0, 4.9]])
    assert sample(logits, temperature=0, top_k=None, top_p=None, generator=None).tolist() == [1, 0]


def test_each_row_is_cut_by_its_own_distribution() -> None:
    logits = torch.tensor([[0.9, 0.05, 0.05], [0.02, 0.49, 0.49]]).log().repeat(500, 1)
    drawn = sample(logits, temperature=1.0, top_k=None, top_p=0.6, generator=torch.Generator().manual_seed(0))
    assert set(drawn[0::2].tolist()) == {0} and set(drawn[1::2].tolist()) == {1, 2}


@pytest.mark.parametrize("settings", [{}, {"top_k": 120}, {"top_p": 1.0}, {"top_k": 120, "top_p": 1.0}], ids=str)
def test_the_padding_of_the_vocabulary_is_never_sampled(settings: dict[str, Any]) -> None:
    """At a temperature at which every token is as likely as any other."""
    generator = torch.Generator().manual_seed(0)
    logits = model_of("mha")(torch.zeros(1, 1, dtype=torch.long))[0, -1].detach().expand(5000, -1)
    arguments: dict[str, Any] = {"top_k": None, "top_p": None} | settings
    drawn: Tensor = sample(logits, temperature=1e6, generator=generator, **arguments)
    assert logits.shape[1] == 128
    assert drawn.bincount(minlength=128)[:VOCAB].min() > 0 and drawn.max() < VOCAB


# --- determinism -----------------------------------------------------------------------------------------------------


def test_one_seed_gives_one_text_and_another_seed_another() -> None:
    model, prompt = model_of("mla"), random_prompt(5)
    texts = [
        written(
            model,
            [prompt],
            max_new_tokens=20,
            temperature=2.0,
            top_k=50,
            top_p=0.95,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_generator_of_ones_own_leaves_torchs_alone() -> None:
    model = model_of("mha")
    before = torch.random.get_rng_state()
    written(model, [[1, 2]], max_new_tokens=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


# --- what is refused -------------------------------------------------------------------------------------------------

EMPTY = "a prompt has no tokens; give at least one (the end-of-text token starts a fresh text)"


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, EMPTY),
        ([[1, 2], []], {}, EMPTY),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature=-0.5 must be 0 (greedy) or from 0.001 to 1e+30"),
        ([[1]], {"temperature": float("inf")}, "temperature=inf must be 0 (greedy) or from 0.001 to 1e+30"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan must be 0 (greedy) or from 0.001 to 1e+30"),
        ([[1]], {"temperature": 1e39}, "temperature=1e+39 must be 0 (greedy) or from 0.001 to 1e+30"),
        ([[1]], {"top_k": 0}, "top_k=0 must be at least 1, or null for no cut"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0 must be in (0, 1], or null for no cut"),
        ([[1]], {"top_p": 1.5}, "top_p=1.5 must be in (0, 1], or null for no cut"),
        (
            [[1] * 60, [1]],
            {"max_new_tokens": 6},
            "a prompt of 60 tokens and max_new_tokens=6 exceed the model's 64 positions; ask for at most 5 new tokens",
        ),
        (
            [[1] * 70],
            {"max_new_tokens": 1},
            "a prompt of 70 tokens exceeds the model's 64 positions; shorten it to at most 64 tokens",
        ),
        (
            [[1] * 64],
            {"max_new_tokens": 2},
            "a prompt of 64 tokens and max_new_tokens=2 exceed the model's 64 positions; ask for at most 1 new tokens",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_out_of_range_are_refused_in_one_sentence(
    prompts: list[list[int]], settings: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 3} | settings
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        next(generate(model_of("mha"), prompts, **arguments))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_model_of_broken_weights_writes_nothing(value: float, temperature: float) -> None:
    model = model_of("mha")
    with torch.no_grad():
        model.norm.weight.fill_(value)
    with pytest.raises(ValueError, match="logits are not finite: its weights are broken, use an earlier checkpoint"):
        next(generate(model, [[1, 2, 3]], max_new_tokens=3, temperature=temperature))


# --- rows that finish, and how a step is computed --------------------------------------------------------------------


def until_stop(model: GPT, prompt: list[int], stop: int, most: int) -> list[int]:
    """What one row gives alone: its greedy tokens up to and including `stop`."""
    tokens = greedy_by_full_forwards(model, prompt, most)
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


@pytest.mark.parametrize("step", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["gqa", "mla", "mla_plain", "mla_shared_latent"])
def test_rows_that_finish_early_leave_the_others_what_they_give_alone(variant: str, step: str) -> None:
    if step == "compile" and variant != "mla":
        pytest.skip("one variant compiled; tests/modeling/test_cache.py compiles them all")
    model = model_of(variant)
    prompts = [random_prompt(length, seed=length) for length in (3, 11, 1, 7)]
    stop = greedy_by_full_forwards(model, prompts[1], 20)[2]  # row 1 is done after at most three tokens
    alone = [until_stop(model, prompt, stop, 20) for prompt in prompts]
    assert len({len(tokens) for tokens in alone}) > 1
    together = written(model, prompts, max_new_tokens=20, temperature=0, stop=stop, step=step)
    for row, tokens in zip(together, alone, strict=True):
        assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {stop}


def test_more_than_eight_compiled_steps_of_one_process_are_none_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    model = model_of("mha")
    for length in range(1, 11):
        prompts = [random_prompt(length, seed=length)]
        assert written(model, prompts, max_new_tokens=2, temperature=0, step="compile") == [
            greedy_by_full_forwards(model, prompts[0], 2)
        ]


@pytest.mark.parametrize("variant", ["gqa", "mla", "mla_shared_latent"])
def test_a_finished_row_takes_no_room_in_the_cache(variant: str) -> None:
    model = model_of(variant).eval()
    tokens_B = torch.tensor([3, 5, 7])
    cache = model.new_cache(3, 12, dtype=torch.float32, device="cpu")
    model(torch.tensor([random_prompt(4, seed) for seed in range(3)]), cache)
    with torch.inference_mode():
        decode = decode_step(model, cache, "eager", tokens_B, torch.ones(3, dtype=torch.bool))
        for running in ([True, True, True], [True, False, True], [True, False, False]):
            decode(tokens_B, torch.tensor(running))
    assert [layer.lengths_B.tolist() for layer in cache] == [[7, 5, 6]] * len(cache)


def test_generation_appends_nothing_to_rows_that_have_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_of("mla"), []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda *args, **kwargs: made.append(new_cache(*args, **kwargs)) or made[-1])
    prompts = [random_prompt(length, seed=length) for length in (3, 11)]
    stop = greedy_by_full_forwards(model, prompts[1], 20)[2]
    alone = [until_stop(model, prompt, stop, 20) for prompt in prompts]
    taken = [len(tokens) - 1 for tokens in alone]  # the last one, a stop or the last asked for, goes nowhere
    assert taken[0] != taken[1]
    written(model, prompts, max_new_tokens=20, temperature=0, stop=stop, step="eager")
    assert made[-1][0].lengths_B.tolist() == [3 + taken[0], 11 + taken[1]]


def test_generation_ends_when_every_row_has_stopped() -> None:
    model, prompt = model_of("mla"), random_prompt(5)
    stop = greedy_by_full_forwards(model, prompt, 5)[3]
    assert written(model, [prompt], max_new_tokens=50, temperature=0, stop=stop) == [until_stop(model, prompt, stop, 50)]


@pytest.mark.parametrize("variant", SHIPPED)
def test_generation_through_a_window_is_the_argmax_of_forwards_that_mask_the_rest(variant: str) -> None:
    model, prompt = model_of(variant), random_prompt(9)
    if not all(map(attends, model.attentions)):
        with pytest.raises(ValueError, match="window=6 would hide tokens that state, tail of GatedDeltaNet holds"):
            written(model, [prompt], max_new_tokens=15, temperature=0, window=6, sinks=2)
        return
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(15):
            cache = model.new_cache(1, 64, dtype=torch.float32, device="cpu", window=6, sinks=2)
            tokens.append(int(model(torch.tensor([tokens]), cache)[0, -1].argmax()))
    windowed = written(model, [prompt], max_new_tokens=15, temperature=0, window=6, sinks=2)
    assert windowed == [tokens[9:]]
    assert windowed != written(model, [prompt], max_new_tokens=15, temperature=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_generation_through_eight_bits_stays_close(dtype: torch.dtype) -> None:
    model, prompt = model_of("mla"), random_prompt(9)
    exact = written(model, [prompt], max_new_tokens=1, temperature=0)
    assert written(model, [prompt], max_new_tokens=1, temperature=0, cache_dtype=dtype) == exact


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("graph", "step=graph needs a CUDA device, not cpu; take step=compile or step=eager"),
        ("fast", "step=fast is unknown; choose auto, eager, compile or graph"),
    ],
)
def test_a_step_that_cannot_run_is_refused(step: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        list(generate(model_of("mha"), [[1, 2]], max_new_tokens=2, step=step))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", SHIPPED)
def test_a_captured_step_writes_what_the_eager_one_writes(variant: str) -> None:
    model = model_of(variant).cuda()
    prompts = [random_prompt(length, seed=length) for length in (3, 11, 1, 7)]
    eager = written(model, prompts, max_new_tokens=20, temperature=0, step="eager")
    assert written(model, prompts, max_new_tokens=20, temperature=0, step="graph") == eager
    if any(hasattr(attention, "state_shapes") for attention in model.attentions):
        return  # whose caches know no window: of a state nothing can be hidden
    windowed = {"window": 6, "sinks": 2, "max_new_tokens": 20, "temperature": 0.0}
    assert written(model, prompts, step="graph", **windowed) == written(model, prompts, step="eager", **windowed)
