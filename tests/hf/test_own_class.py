"""Our own transformers class: every variant through save_pretrained and back, bit for bit, and `generate` with our cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from harness.data.tokenizer import END_OF_TEXT, bytes_specification
from harness.errors import UserError
from harness.hf.classes import as_own, generation_cache, misfits, register, save_theirs
from modeling.attention.contract import randomise, relative_error
from modeling.attention.layer_cache import formula_bytes
from modeling.attention.quantisation import cache_format
from modeling.generation import decode_step, generate
from modeling.gpt import GPT
from tests.support.variants import SHIPPED, config_at, gpt_from

transformers = pytest.importorskip("transformers")

VARIANTS = {name: [f"attention={name}"] for name in SHIPPED} | {
    "relu2 with biases": ["attention=mha_learned", "model.mlp=relu2", "model.bias=true"],
    "unrotated, its own head": ["attention=gqa", "attention.positions=none", "model.tie_embeddings=false"],
    "no latent norm": ["attention=mla", "attention.latent_norm=none"],
    "split latents with layer norms": ["attention=mla", "attention.kv_latent=split", "attention.latent_norm=layer"],
    "norms after the up-projection": ["attention=mla", "attention.latent_norm_place=up_projected", "attention.q_lora_rank=20"],
    "rotated after the up-projection": ["attention=mla_plain", "attention.positions=rope_after_up"],
    "stored frequencies": ["attention=mla", "attention.rope_frequencies=stored"],
    "biases on MLA's queries": ["attention=mla", "attention.projection_bias=all"],
    "shared weights, its own head": ["attention=mla_shared_weights", "model.tie_embeddings=false"],
    "a wider vocabulary": ["attention=mla_plain", "model.vocab_size=130"],
}
FEW = ["gqa", "mha_learned", "mla", "mla_plain", "mla_shared_latent", "rotated after the up-projection"]


def build(name: str) -> GPT:
    model = randomise(gpt_from(VARIANTS[name])).eval()
    if name == "stored frequencies":
        for number, attention in enumerate(model.attentions):  # unlike in each layer
            attention.rope.set_extra_state(torch.tensor([0.9, 0.31, 0.007], dtype=torch.float64) / (number + 1))
    return model


class Folders:
    """Each variant as a GPT and as the folder that it was saved to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str) -> tuple[GPT, Path]:
        folder = self.root / name.replace(" ", "_")
        model = build(name)
        if not folder.exists():
            save_theirs(as_own(model, config_at(*VARIANTS[name])), folder, stops=[99])
        return model, folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    register()
    return Folders(tmp_path_factory.mktemp("own"))


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def loaded(folders: Folders, name: str, **options: Any) -> tuple[GPT, Any]:
    model, folder = folders(name)
    return model, load(folder, **options)


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(99, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: GPT, prompts: list[list[int]], new_tokens: int) -> torch.Tensor:
    return torch.stack(list(generate(model, prompts, max_new_tokens=new_tokens, temperature=0)), dim=1)


WRITE = {"do_sample": False, "eos_token_id": None}  # to the last token


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_comes_back_bit_for_bit_and_writes_the_same_text(folders: Folders, name: str) -> None:
    model, theirs = loaded(folders, name)
    tokens_BT = tokens(2, 40)
    assert type(theirs).__name__ == "AttentionAblationForCausalLM" and not theirs.training
    logits_BTC = theirs(tokens_BT).logits
    assert torch.equal(logits_BTC, model(tokens_BT)[..., : model.vocab_size]) and logits_BTC.std() > 0.5
    expected = greedy(model, tokens_BT[:, :9].tolist(), 20)
    for cached in (True, False):
        written = theirs.generate(tokens_BT[:, :9], max_new_tokens=20, use_cache=cached, **WRITE)
        assert torch.equal(written[:, 9:], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_saved_again_is_the_same_and_holds_no_code(folders: Folders, name: str, tmp_path: Path) -> None:
    model, theirs = loaded(folders, name)
    theirs.save_pretrained(tmp_path)
    again, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(tokens(1, 20)).logits, model(tokens(1, 20))[..., : model.vocab_size])
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    size = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    names = json.loads((tmp_path / "model.safetensors").read_bytes()[8 : 8 + size]).keys() - {"__metadata__"}
    written = len(list(model.parameters())) + (2 if name == "stored frequencies" else 0)
    assert len(names) == written  # a tensor that two places share once
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_left_padded_rows_write_what_they_write_alone(folders: Folders, name: str) -> None:
    model, theirs = loaded(folders, name)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (12, 5, 1)]
    padded = torch.tensor([[7] * (12 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (12 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = greedy(model, prompts, 10)
    for cached in (True, False):
        written = theirs.generate(padded, attention_mask=mask, max_new_tokens=10, use_cache=cached, **WRITE)
        assert torch.equal(written[:, 12:], expected)
    alone = torch.cat([greedy(model, [prompt], 10) for prompt in prompts])
    assert torch.equal(expected, alone)
    unmasked = theirs.generate(padded, attention_mask=torch.ones_like(mask), max_new_tokens=10, **WRITE)
    assert not torch.equal(unmasked[:, 12:], expected)


@torch.no_grad()
@pytest.mark.parametrize(("name", "dtype"), [("mla_plain", "int8"), ("mla_plain", "int4_rotated"), ("gqa", "kc4v4")])
def test_it_writes_through_a_cache_in_few_bits_as_our_own_generation_does(folders: Folders, name: str, dtype: str) -> None:
    model, theirs = loaded(folders, name)
    prompts = tokens(2, 9)
    written = theirs.generate(prompts, max_new_tokens=30, past_key_values=generation_cache(40, dtype), **WRITE)
    ours = generate(model, prompts.tolist(), max_new_tokens=30, temperature=0, cache_dtype=cache_format(dtype))
    assert torch.equal(written[:, 9:], torch.stack(list(ours), dim=1))
    assert dtype == "int8" or not torch.equal(written, theirs.generate(prompts, max_new_tokens=30, **WRITE))
    cache = generation_cache(40, dtype)
    theirs.generate(prompts, max_new_tokens=12, num_beams=3, do_sample=False, eos_token_id=None, past_key_values=cache)
    assert [layer.bytes_per_token for layer in cache.layers] == [
        formula_bytes(attention, cache_format(dtype)) for attention in model.attentions
    ]


def test_a_format_that_cannot_be_kept_is_refused(folders: Folders) -> None:
    _, theirs = loaded(folders, "mla_plain")
    with pytest.raises(UserError, match=r"^cache.dtype=k3v9 is unknown; choose one of float32, "):
        generation_cache(40, "k3v9")
    with pytest.raises(UserError, match=r"^cache.dtype=k8v4 keeps values in bits of their own"):
        theirs.generate(tokens(1, 9), max_new_tokens=2, past_key_values=generation_cache(40, "k8v4"), **WRITE)


@torch.no_grad()
@pytest.mark.parametrize("name", [*FEW, "gdn_3_1"])
def test_beams_and_samples_are_those_without_a_cache(folders: Folders, name: str) -> None:
    _, theirs = loaded(folders, name)
    prompts = tokens(2, 6)
    options: dict[str, dict[str, Any]] = {
        "beams": {"num_beams": 3, "do_sample": False, "eos_token_id": None},
        "samples": {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "top_k": 20, "eos_token_id": None},
    }
    for settings in options.values():
        texts = []
        for cached in (True, False):
            torch.manual_seed(3)
            texts.append(theirs.generate(prompts, max_new_tokens=12, use_cache=cached, **settings))
        assert torch.equal(*texts)
    beams = theirs.generate(prompts, max_new_tokens=12, **options["beams"])
    assert not torch.equal(beams, theirs.generate(prompts, max_new_tokens=12, **WRITE))  # rows were reordered


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_it_decodes_with_the_variants_own_cache(folders: Folders, name: str) -> None:
    model, theirs = loaded(folders, name)
    written = theirs.generate(tokens(2, 6), max_new_tokens=5, return_dict_in_generate=True, **WRITE)
    layers = written.past_key_values.layers
    assert [layer.bytes_per_token for layer in layers] == [
        formula_bytes(attention, torch.float32) for attention in model.attentions
    ]
    assert [set(layer.buffers) for layer in layers] == [set(attention.cache_shapes) for attention in model.attentions]
    assert all(layer.lengths_B.tolist() == [10, 10] and layer.max_seq_len == 10 for layer in layers)  # all but the last


@torch.no_grad()
def test_a_text_read_in_pieces_is_the_text_read_at_once(folders: Folders) -> None:
    model, theirs = loaded(folders, "mla")
    tokens_BT = tokens(2, 20)
    first = theirs(tokens_BT[:, :8], use_cache=True)
    rest = theirs(tokens_BT[:, 8:], past_key_values=first.past_key_values, attention_mask=torch.ones(2, 20))
    assert relative_error(torch.cat([first.logits, rest.logits], dim=1), model(tokens_BT)[..., :100]) < 1e-5
    chunked = theirs.generate(tokens_BT, max_new_tokens=6, prefill_chunk_size=7, **WRITE)
    assert torch.equal(chunked, theirs.generate(tokens_BT, max_new_tokens=6, **WRITE))
    assert relative_error(theirs(tokens_BT, logits_to_keep=3).logits, theirs(tokens_BT).logits[:, -3:]) < 1e-6
    assert theirs(tokens_BT).past_key_values is None
    assert torch.equal(theirs(tokens_BT, return_dict=False)[0], theirs(tokens_BT).logits)


@pytest.mark.parametrize("name", ["mha_learned", "mla_plain", "mla_frozen", "mla_shared_weights"])
def test_labels_give_the_shifted_loss_and_every_parameter_its_gradient(folders: Folders, name: str) -> None:
    model, theirs = loaded(folders, name)
    tokens_BT = tokens(2, 20)
    theirs.train()
    theirs(tokens_BT, labels=tokens_BT).loss.backward()
    loss = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    for (parameter_name, mine), his in zip(model.named_parameters(), theirs.parameters(), strict=True):
        if mine.grad is None:
            assert his.grad is None and not his.requires_grad, parameter_name
        else:
            assert relative_error(his.grad, mine.grad) < 1e-4, parameter_name
    with torch.no_grad():
        labels = tokens_BT.clone()
        labels[:, :15] = -100
        logits_BTC = theirs(tokens_BT).logits
        expected = F.cross_entropy(logits_BTC[:, 14:-1].flatten(0, 1), tokens_BT[:, 15:].flatten())
        assert theirs(tokens_BT, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert theirs(tokens_BT, labels=labels, num_items_in_batch=5).loss.item() == pytest.approx(2 * expected.item(), 1e-6)


def test_a_step_of_training_lowers_the_loss(folders: Folders) -> None:
    _, theirs = loaded(folders, "mla_plain")
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    tokens_BT, losses = tokens(4, 30), []
    for _ in range(5):
        loss = theirs(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), labels=tokens_BT).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["mla", "stored frequencies", "mla_plain"])
def test_it_loads_in_another_dtype_as_our_own_model_is_cast(folders: Folders, name: str, dtype: torch.dtype) -> None:
    model, theirs = loaded(folders, name, dtype=dtype)
    assert theirs.dtype == dtype and theirs.config.dtype == dtype
    assert torch.equal(theirs(tokens(1, 60)).logits, model.to(dtype)(tokens(1, 60))[..., :100])
    written = theirs.generate(tokens(1, 5), max_new_tokens=4, return_dict_in_generate=True, **WRITE)
    assert {buffer.dtype for layer in written.past_key_values.layers for buffer in layer.buffers.values()} == {dtype}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attention": {"mechanism": "os.system"}}, r"attention.mechanism=os.system is unknown"),
        ({"attention": {"kv_lora_rank": "many"}}, r"attention.kv_lora_rank=many must be a whole number"),
        ({"attention": {"odd": 1}}, r"attention.odd is not a field"),
        ({"attention": {"kv_lora_rank": 4096}}, r"kv_lora_rank=4096 compresses nothing"),
        ({"attention": {"rope_scaling": {"rope_type": "odd"}}}, r"rope_scaling"),
        ({"attention": {"backend": "odd"}}, r"attention.backend=odd is unknown"),
        ({"model": {"d_model": "wide"}}, r"model.d_model=wide must be a whole number"),
        ({"model": {"n_layers": 0}}, r"model.n_layers=0 must be 1 or more"),
        ({"model": {"mlp": "odd"}}, r"mlp=odd is unknown"),
        ({"model": {"causal": False}}, r"model.causal=false cannot write text"),
        ({"model": {"_target_": "os.system"}}, r"model._target_ is not a field"),
        ({"vocab_size": "all"}, r"vocab_size=all must be a whole number"),
        ({"vocab_size": 0}, r"vocab_size=0 is too small"),
        ({"vocab_size": None}, r"config.json has no vocab_size"),
        ({"model": None}, r"config.json has no model"),
        ({"attention": 3}, r"attention.mechanism=null is unknown"),
    ],
)
def test_a_config_that_no_run_may_have_is_one_sentence(
    folders: Folders, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    _, folder = folders("mla_plain")
    written = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        written[key] = written[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match=sentence) as refused:
        load(tmp_path)
    assert len(str(refused.value).splitlines()) == 1


def test_what_cannot_be_generated_is_refused_in_one_sentence(folders: Folders) -> None:
    _, theirs = loaded(folders, "mla_plain")
    prompts = tokens(2, 10)
    assert theirs.generate(prompts, max_new_tokens=55, **WRITE).shape == (2, 65)  # the last token is never read
    cache = theirs(prompts, use_cache=True).past_key_values
    attempts: dict[str, Any] = {
        r"exceed the model's 64 positions: ask for 1 tokens less": lambda: theirs.generate(prompts, max_new_tokens=56),
        r"positions: ask for 2 tokens": lambda: theirs.generate(prompts, max_new_tokens=57, use_cache=False),
        r"65 tokens are more than the model's 64 positions": lambda: theirs(tokens(1, 65)),
        r"66 tokens are more": lambda: theirs(tokens(2, 56), past_key_values=cache),
        r"past_key_values hold 2 rows and input_ids 1": lambda: theirs(tokens(1, 1), past_key_values=cache),
        r"past_key_values is a DynamicCache": lambda: theirs(prompts, past_key_values=transformers.DynamicCache()),
        r"must have \(2, 11\)": lambda: theirs(tokens(2, 1), past_key_values=cache, attention_mask=torch.ones(2, 1)),
        r"cache_implementation=static is none": lambda: theirs.generate(prompts, cache_implementation="static"),
        r"assisted_generation needs a cache": lambda: theirs.generate(prompts[:1], prompt_lookup_num_tokens=2),
        r"the vocabulary of this class stays": lambda: theirs.resize_token_embeddings(120),
        r"either input_ids or inputs_embeds": lambda: theirs(attention_mask=torch.ones(2, 10)),
        r"must have \(2, 10\) or \(1, 10\)": lambda: theirs(prompts, position_ids=torch.arange(9)[None]),
        r"cache_position must be 0 to 9": lambda: theirs(prompts, cache_position=torch.arange(1, 11)),
    }
    for sentence, attempt in attempts.items():
        with pytest.raises(UserError, match=sentence) as refused:
            attempt()
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(TypeError, match="positions_ids"):
        theirs(prompts, positions_ids=prompts)


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_hidden_states_and_attentions_are_those_of_the_computation(folders: Folders, name: str) -> None:
    model, theirs = loaded(folders, name)
    tokens_BT, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    plain = theirs(tokens_BT, attention_mask=mask)
    shown = theirs(tokens_BT, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and plain.attentions is None
    real = mask.bool()
    assert relative_error(shown.logits[real], plain.logits[real]) < 1e-5
    embedded, *_, last = shown.hidden_states
    assert len(shown.hidden_states) == 3
    if model.position_embedding is None:
        assert torch.equal(embedded, model.embedding(tokens_BT))
    assert relative_error(model.logits(last)[..., :100][real], plain.logits[real]) < 1e-5
    block = theirs.model.blocks[0]
    assert relative_error(shown.hidden_states[1], block(embedded, None, None, real)[0]) < 1e-5
    for weights_BHTS in shown.attentions:
        assert weights_BHTS.shape == (2, 4, 12, 12)
        assert torch.allclose(weights_BHTS.sum(dim=-1).transpose(1, 2)[real], torch.ones(4))
        assert weights_BHTS[0, :, 5:, :5].eq(0).all() and weights_BHTS.triu(1).eq(0).all()
    first = theirs(tokens_BT[:, :8], attention_mask=mask[:, :8], use_cache=True)
    rest = theirs(tokens_BT[:, 8:], attention_mask=mask, past_key_values=first.past_key_values, output_attentions=True)
    for cached, whole in zip(rest.attentions, shown.attentions, strict=True):
        assert relative_error(cached, whole[:, :, 8:]) < 1e-5
    assert {attention.backend for attention in theirs.model.attentions} != {"reference"}


def test_weights_of_layers_that_keep_a_state_are_refused_in_one_sentence(folders: Folders) -> None:
    _, theirs = loaded(folders, "gdn_3_1")
    with pytest.raises(UserError, match="layers that keep a state and weigh no tokens: leave it out"):
        theirs(tokens(2, 12), output_attentions=True)


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_embeddings_stand_in_for_tokens_and_positions_for_places(folders: Folders, name: str) -> None:
    _, theirs = loaded(folders, name)
    tokens_BT, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    expected = theirs(tokens_BT, attention_mask=mask).logits
    embedded = theirs.get_input_embeddings()(tokens_BT)
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    given = {"attention_mask": mask, "position_ids": positions, "cache_position": torch.arange(12)}
    assert torch.equal(theirs(inputs_embeds=embedded, **given).logits, expected)
    written = theirs.generate(tokens_BT, attention_mask=mask, max_new_tokens=6, **WRITE)
    assert torch.equal(theirs.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=6, **WRITE), written[:, 12:])
    assert torch.equal(
        theirs.generate(tokens_BT, attention_mask=mask, position_ids=positions, max_new_tokens=6, **WRITE), written
    )
    if name == "mha_learned":
        moved = theirs(tokens_BT, position_ids=torch.arange(7, 19)[None]).logits
        assert relative_error(moved, theirs(tokens_BT).logits) > 0.01


BYTES = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of our class with a tokenizer of plain bytes, as an export."""
    folder, overrides = tmp_path_factory.mktemp("text"), ["attention=mla_plain", "model.vocab_size=257"]
    save_theirs(as_own(randomise(gpt_from(overrides)).eval(), config_at(*overrides)), folder, stops=[256])
    (folder / "tokenizer.json").write_text(json.dumps(bytes_specification()))
    (folder / "tokenizer_config.json").write_text(json.dumps(BYTES))
    register()
    return folder


def test_generate_takes_what_it_takes_of_stock_classes(written: Path) -> None:
    model, tokenizer = load(written), transformers.AutoTokenizer.from_pretrained(written)
    prompt = tokenizer("the sea", return_tensors="pt")
    longest = model.generate(**prompt, max_new_tokens=12, **WRITE)[0, 7:].tolist()
    stop = chr(next(token for token in longest[2:] if 32 < token < 127))
    stopped = model.generate(**prompt, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer, **WRITE)[0, 7:]
    ends = next(place for place, token in enumerate(longest) if token == ord(stop))
    assert stopped.tolist() == longest[: ends + 1] and len(stopped) < 12
    detailed = model.generate(
        **prompt,
        max_new_tokens=3,
        output_hidden_states=True,
        output_attentions=True,
        output_logits=True,
        return_dict_in_generate=True,
        **WRITE,
    )
    assert detailed.sequences[0, 7:].tolist() == longest[:3]
    assert [len(step) for step in detailed.hidden_states] == [3, 3, 3]
    assert [step[0].shape[-1] for step in detailed.attentions] == [7, 8, 9]
    for options in (
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "bad_words_ids": [[5]]},
        {"guidance_scale": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    ):
        assert model.generate(**prompt, max_new_tokens=5, **options).shape[1] <= 12


def test_a_pipeline_writes_a_batch_up_to_a_stop(written: Path) -> None:
    write = transformers.pipeline("text-generation", model=str(written))
    alone = [write(text, max_new_tokens=8, do_sample=False)[0] for text in ("the sea", "a")]
    batch = write(["the sea", "a"], batch_size=2, max_new_tokens=8, do_sample=False)
    assert [one[0] for one in batch] == alone
    stop = alone[0]["generated_text"][9]
    (stopped,) = write("the sea", max_new_tokens=8, do_sample=False, stop_strings=[stop], tokenizer=write.tokenizer)
    assert len(stopped["generated_text"]) <= 10


def test_activations_are_computed_again_when_asked(written: Path) -> None:
    model, tokens_BT = load(written).train(), tokens(2, 10)
    model(tokens_BT, labels=tokens_BT).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    model(tokens_BT, labels=tokens_BT).loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_peft_trains_adapters_saves_and_merges_them(written: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")
    adapted, tokens_BT = peft.get_peft_model(load(written), options), tokens(4, 20)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), labels=tokens_BT).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(written), tmp_path).eval()
    with torch.no_grad():
        logits_BTC = adapted.eval()(input_ids=tokens_BT).logits
        assert torch.equal(again(input_ids=tokens_BT).logits, logits_BTC)
        text = again.generate(input_ids=tokens_BT, max_new_tokens=4, **WRITE)
        merged = again.merge_and_unload()
        assert relative_error(merged(tokens_BT).logits, logits_BTC) < 1e-4
        assert torch.equal(merged.generate(tokens_BT, max_new_tokens=4, **WRITE), text)


def test_a_model_from_a_configuration_alone_starts_as_our_own_does(folders: Folders) -> None:
    config = as_own(gpt_from(["attention=mla"]), config_at("attention=mla", "model.zero_init_outputs=true")).config
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    ours = gpt_from(["attention=mla", "model.zero_init_outputs=true"])
    for mine, his in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, his)
    assert theirs.model.blocks[0].attention.o_proj.weight.abs().max() == 0


@torch.no_grad()
def test_weights_that_a_file_lacks_are_told_and_get_values(folders: Folders, tmp_path: Path) -> None:
    _, theirs = loaded(folders, "mla")
    state = {name: tensor for name, tensor in theirs.state_dict().items() if ".blocks.1." not in name}
    theirs.save_pretrained(tmp_path, state_dict=state)
    again, info = load(tmp_path, output_loading_info=True)
    assert "model.blocks.1.attention.o_proj.weight" in info["missing_keys"]
    assert torch.equal(again.model.blocks[1].mlp_norm.weight, torch.ones(48))
    assert 0.02 < again.model.blocks[1].attention.o_proj.weight.std() < 0.1  # init_std=0.05
    assert torch.equal(again.model.blocks[0].mlp_norm.weight, theirs.model.blocks[0].mlp_norm.weight)


def test_its_configuration_answers_in_transformers_words(folders: Folders) -> None:
    _, folder = folders("mla_plain")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 2, 4)
    assert (config.max_position_embeddings, config.vocab_size, config.tie_word_embeddings) == (64, 100, True)
    theirs = load(folder)
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert theirs.resize_token_embeddings(100) is theirs.get_input_embeddings()


def test_some_shipped_variants_have_no_stock_class_and_are_tested_here() -> None:
    without = {name for name in VARIANTS if misfits(config_at(*VARIANTS[name]))}
    assert {"mha_learned", "mla_plain", "mla_shared_latent", "stored frequencies", "no latent norm"} <= without
    assert not without & {"gqa", "mla", "mla_frozen"}


@torch.no_grad()
def test_a_step_that_cannot_be_captured_runs_eagerly_and_is_said_once(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, theirs = loaded(folders, "mla")
    asked = []

    def reluctant(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments[2])
        if arguments[2] == "auto":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return decode_step(*arguments, **options)

    monkeypatch.setattr("harness.hf.own_class.decode_step", reluctant)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("harness"), "propagate", True)
    prompts = tokens(2, 6)
    with caplog.at_level("WARNING"):
        written = theirs.generate(prompts, max_new_tokens=9, **WRITE)
    assert torch.equal(written[:, 6:], greedy(model, prompts.tolist(), 9)) and asked == ["auto", "eager"]
    (said,) = [record.message for record in caplog.records if "captured" in record.message]
    assert said.endswith("it runs eagerly: operation not permitted when stream is capturing")


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_captured_steps_write_what_is_written_without_a_cache(folders: Folders, name: str) -> None:
    theirs = loaded(folders, name)[1].cuda()
    prompts = tokens(3, 9).cuda()
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    for settings in (WRITE, {"num_beams": 3, **WRITE}):
        written = theirs.generate(
            prompts, attention_mask=mask, max_new_tokens=20, return_dict_in_generate=True, use_cache=True, **settings
        )
        plain = theirs.generate(prompts, attention_mask=mask, max_new_tokens=20, use_cache=False, **settings)
        assert torch.equal(written.sequences, plain) and all(layer.static for layer in written.past_key_values.layers)
