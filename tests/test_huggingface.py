"""Our models as transformers' classes: the same logits, the same text, or a refusal."""

from __future__ import annotations

import pytest
import torch

from harness.errors import UserError
from harness.huggingface import as_transformers, cache_bytes_per_token, difference, write
from modeling.attention.contract import randomise, relative_error
from modeling.generation import generate
from tests.support.variants import config_at, gpt_from

pytest.importorskip("transformers")

SAME = {
    "mha": ["attention=mha"],
    "gqa": ["attention=gqa"],
    "mqa": ["attention=mqa"],
    "mha, biases and another base": ["attention=mha", "model.bias=true", "attention.rope_theta=500.0"],
    "gqa, its own head": ["attention=gqa", "model.tie_embeddings=false"],
    "mla": ["attention=mla"],
    "mla, its own head": ["attention=mla", "model.tie_embeddings=false"],
    "mla, query rank": ["attention=mla", "attention.q_lora_rank=20"],
    "mla, unlike widths": ["attention=mla", "attention.qk_nope_head_dim=10", "attention.v_head_dim=14"],
}


@pytest.mark.parametrize("overrides", SAME.values(), ids=SAME)
def test_logits_agree_where_they_are_large(overrides: list[str]) -> None:
    model = randomise(gpt_from(overrides)).eval()
    theirs = as_transformers(model, config_at(*overrides))
    tokens_BT = torch.randint(100, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours_BTC, theirs_BTC = model(tokens_BT), theirs(input_ids=tokens_BT).logits
    assert theirs_BTC.shape[-1] == 100 and theirs_BTC.std() > 1
    assert relative_error(ours_BTC[..., :100], theirs_BTC) < 1e-4
    assert difference(model, theirs) < 1e-4


def test_a_wrong_weight_is_a_difference() -> None:
    model = randomise(gpt_from(["attention=mla"])).eval()
    theirs = as_transformers(model, config_at("attention=mla"))
    with torch.no_grad():
        theirs.model.layers[1].self_attn.kv_b_proj.weight.mul_(1.01)
    assert difference(model, theirs) > 1e-4


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_both_write_the_same_text(attention: str) -> None:
    model = randomise(gpt_from([f"attention={attention}"])).eval()
    theirs = as_transformers(model, config_at(f"attention={attention}"))
    prompts_BT = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(2))
    ours = torch.stack(list(generate(model, prompts_BT.tolist(), max_new_tokens=6, temperature=0)), dim=1)
    assert torch.equal(theirs.generate(prompts_BT, max_new_tokens=6, do_sample=False)[:, 9:], ours)


def test_each_written_token_is_stamped_once() -> None:
    theirs = as_transformers(gpt_from(["attention=mha"]).eval(), config_at("attention=mha"))
    stamps: list[int] = []
    write(theirs, torch.zeros(2, 5, dtype=torch.long), 4, lambda: stamps.append(len(stamps)))
    assert stamps == [0, 1, 2, 3]


@pytest.mark.parametrize(("attention", "elements"), [("mha", 2 * 4 * 12), ("gqa", 2 * 2 * 12), ("mla", 24 + 6)])
def test_their_cache_is_measured(attention: str, elements: int) -> None:
    theirs = as_transformers(gpt_from([f"attention={attention}"]).eval(), config_at(f"attention={attention}"))
    assert cache_bytes_per_token(theirs) == 2 * 4 * elements  # layers, float32


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["attention=mha_learned"], r"attention.positions=learned"),
        (["attention=gqa", "attention.qk_norm=true"], r"attention.qk_norm=True"),
        (["attention=mha", "attention.v_head_dim=7"], r"attention.v_head_dim=7"),
        (["attention=mha", "model.mlp=relu2"], r"model.mlp=relu2"),
        (["attention=mla_plain"], r"attention.positions=learned"),
        (["attention=mla", "attention.n_kv_heads=2"], r"attention.n_kv_heads=2"),
        (["attention=mla", "attention.latent_norm=none"], r"attention.latent_norm=none"),
        (["attention=mla", "attention.kv_latent=split", "model.bias=true"],
         r"attention.kv_latent=split and no model.bias=true"),
    ],
)  # fmt: skip
def test_what_they_do_not_have_is_refused_in_one_sentence(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named) as refused:
        as_transformers(gpt_from(overrides), config_at(*overrides))
    assert len(str(refused.value).splitlines()) == 1
