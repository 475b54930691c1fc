"""MLA's controls: a latent that nothing is learned in is the same function as mla with those weights, and stays as drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from harness.config.schema import OptimizerConfig
from harness.training.checkpoint import load_checkpoint, verified
from harness.training.optimizer import build_optimizer
from modeling.attention.contract import randomise, relative_error
from tests.support.tiny_model import save_checkpoint
from tests.support.variants import attention_from, gpt_from

ADAMW = OptimizerConfig(name="adamw", lr=0.1, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.5, grad_clip=1.0)


@pytest.mark.parametrize("split", [[], ["attention.kv_latent=split"]])
@torch.no_grad()
def test_a_slice_is_mla_whose_down_projection_is_the_first_rows_of_the_identity(split: list[str]) -> None:
    control = randomise(attention_from(["attention=mla_slice", *split])).eval()
    learned = attention_from(["attention=mla", *split]).eval()
    state = control.state_dict() | {"kv_down_proj.weight": torch.eye(24, 48)}
    learned.load_state_dict(state)
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    assert relative_error(control(x), learned(x)) <= 1e-6


@torch.no_grad()
def test_a_frozen_latent_is_mla_with_those_weights() -> None:
    control, learned = attention_from(["attention=mla_frozen"]).eval(), attention_from(["attention=mla"]).eval()
    learned.load_state_dict(control.state_dict())
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(control(x), learned(x))


def test_training_moves_everything_but_the_frozen_projection() -> None:
    torch.manual_seed(0)
    model = gpt_from(["attention=mla_frozen"])
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, ADAMW)
    tokens = torch.randint(100, (4, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        model.zero_grad()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    frozen = {f"blocks.{layer}.attention.kv_down_proj.weight" for layer in range(2)}
    assert before.keys() - moved == frozen
    saved = {path.split("/", 1)[1] for path in optimizer.state_dict()}
    assert saved == before.keys() - frozen


def test_muon_leaves_the_frozen_projection_alone_too() -> None:
    model = gpt_from(["attention=mla_frozen"])
    muon = dataclasses.replace(ADAMW, name="muon", muon_lr=0.1, muon_momentum=0.95)
    groups = build_optimizer(model, muon).settings()
    trained = [name for group in groups for name in group["parameters"]]
    frozen = {f"blocks.{layer}.attention.kv_down_proj.weight" for layer in range(2)}
    assert sorted(trained) == sorted(dict(model.named_parameters()).keys() - frozen)


def test_a_checkpoint_brings_the_drawn_projection_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = gpt_from(["attention=mla_frozen"])
    path = save_checkpoint(tmp_path, model=trained, optimizer=build_optimizer(trained, ADAMW), state={"step": 1})
    torch.manual_seed(1)
    other = gpt_from(["attention=mla_frozen"])
    load_checkpoint(verified(path), model=other, optimizer=build_optimizer(other, ADAMW))
    for ours, theirs in zip(other.attentions, trained.attentions, strict=True):
        assert torch.equal(ours.kv_down_proj.weight, theirs.kv_down_proj.weight)
        assert not ours.kv_down_proj.weight.requires_grad


@pytest.mark.parametrize("init", ["normal", "fan_in", "xavier"])
def test_a_frozen_projection_keeps_the_variance_of_its_input_whatever_the_initialisation(init: str) -> None:
    draws = []
    for seed, std in ((0, 0.02), (0, 0.5), (1, 0.02)):
        torch.manual_seed(seed)
        model = gpt_from(["attention=mla_frozen"], init=init, init_std=std)
        weights = [attention.kv_down_proj.weight for attention in model.attentions]
        assert torch.stack(weights).std().item() == pytest.approx(48**-0.5, rel=0.05)
        assert not torch.equal(*weights)
        draws.append(weights[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])  # of the seed alone


def test_the_two_controls_share_a_cache_across_layers_as_mla_does() -> None:
    for control in ("mla_frozen", "mla_slice"):
        model = gpt_from([f"attention={control}", "attention.sharing=latent", "attention.sharing_layers=2"])
        assert [attention.cache_formula for attention in model.attentions] == [30, 0]
        assert "blocks.1.attention.kv_down_proj.weight" not in dict(model.named_parameters())
