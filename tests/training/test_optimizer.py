"""Which parameter is updated by what, at which rate, and what of it is saved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.config.identity import setup_hash
from harness.config.schema import OptimizerConfig
from harness.errors import UserError
from harness.training.optimizer import build_optimizer
from tests.support.tiny_model import optimizer_config, tiny_model
from tests.support.variants import config_at, gpt_from


def _decays(model: torch.nn.Module, config: OptimizerConfig) -> dict[str, float]:
    groups = build_optimizer(model, config).settings()
    return {name: group["weight_decay"] for group in groups for name in group["parameters"]}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [True, False])
def test_weight_decay_spares_norms_biases_and_embeddings_and_nothing_else(name: str, tie: bool) -> None:
    model = gpt_from(["attention=mha_learned", "model.bias=true", f"model.tie_embeddings={str(tie).lower()}"])
    decays = _decays(model, optimizer_config(name))
    assert decays.keys() == dict(model.named_parameters()).keys(), "every parameter is in exactly one group"
    spared = {name for name, decay in decays.items() if decay == 0.0}
    assert spared == {
        name for name, p in model.named_parameters() if p.ndim == 1 or name in ("embedding.weight", "position_embedding.weight")
    }
    assert ("head.weight" in decays) is not tie


@pytest.mark.parametrize("tie", [True, False])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tie: bool) -> None:
    model = gpt_from(["attention=mla", f"model.tie_embeddings={str(tie).lower()}"])
    groups = build_optimizer(model, optimizer_config("muon")).settings()
    muon = {name for group in groups if group["optimizer"] == "Muon" for name in group["parameters"]}
    assert muon == {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert not any(part in name for name in muon for part in ("embedding", "head", "norm"))


def test_the_decays_of_a_state_are_not_decayed_and_its_convolution_is_adamws() -> None:
    groups = build_optimizer(gpt_from(["attention=gdn_3_1"]), optimizer_config("muon")).settings()
    group_of = {name.removeprefix("blocks.0.attention."): group for group in groups for name in group["parameters"]}
    assert (
        group_of["a_log"]["weight_decay"]
        == group_of["dt_bias"]["weight_decay"]
        == group_of["o_norm.weight"]["weight_decay"]
        == 0
    )
    assert group_of["conv.weight"]["optimizer"] == "AdamW" and group_of["conv.weight"]["weight_decay"] > 0
    assert group_of["decay_proj.weight"]["optimizer"] == "Muon"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_all_rates_follow_the_factor_from_their_own_peaks(name: str) -> None:
    """A step at factor 1/2 moves every weight by half of what the same step at factor 1 does (no decay)."""
    moved = []
    for factor in (1.0, 0.5):
        model = tiny_model(dropout=0.0)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = build_optimizer(model, optimizer_config(name, weight_decay=0.0))
        assert optimizer.set_lr(factor) == pytest.approx(0.01 * factor)
        model.loss(torch.arange(8)[None], torch.arange(1, 9)[None]).backward()
        optimizer.step()
        moved.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    for full, half in zip(*moved, strict=True):
        assert full.abs().max() > 1e-4
        torch.testing.assert_close(half, full / 2, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [True, False])
def test_with_width_base_the_blocks_matrices_take_their_share_of_the_rate(name: str, tie: bool) -> None:
    model = gpt_from(["attention=mla", f"model.tie_embeddings={str(tie).lower()}"])
    width = model.embedding.embedding_dim

    def rates(width_base: int | None) -> dict[str, tuple[str, float]]:
        groups = build_optimizer(model, dataclasses.replace(optimizer_config(name), width_base=width_base)).settings()
        return {path: (group["optimizer"], group["peak_lr"]) for group in groups for path in group["parameters"]}

    plain, narrow = rates(None), rates(width // 2)
    assert plain == rates(width) and plain.keys() == narrow.keys()
    for path, parameter in model.named_parameters():
        share = 0.5 if path.startswith("blocks.") and parameter.ndim == 2 else 1.0
        assert narrow[path] == (plain[path][0], pytest.approx(share * plain[path][1])), path


def test_width_base_is_part_of_what_a_run_is_but_its_absence_is_as_before() -> None:
    setups = [setup_hash(config_at(*more)) for more in ([], ["optimizer.width_base=null"], ["optimizer.width_base=64"])]
    assert setups[0] == setups[1] != setups[2]
    with pytest.raises(UserError, match=r"optimizer\.width_base=0 must be 1 or more"):
        config_at("optimizer.width_base=0")


def test_a_model_brings_the_width_of_its_rate_and_a_command_takes_it_away() -> None:
    bases = [
        config_at(*more).optimizer.width_base for more in ([], ["model=small"], ["model=small", "optimizer.width_base=null"])
    ]
    assert bases == [None, 192, None]


def test_muons_updates_have_adamws_size_whatever_the_matrixs_shape() -> None:
    """A matrix that was made orthogonal, times 0.2 sqrt(its longer side): root mean square 0.2 of the rate."""
    model = gpt_from(["attention=mqa", "model.d_model=96"], n_layers=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = optimizer_config("muon", weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    optimizer.set_lr(1.0)
    assert config.muon_lr is not None
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    (group,) = [group for group in optimizer.settings() if group["optimizer"] == "Muon"]
    shapes = set()
    for name in group["parameters"]:
        moved = model.get_parameter(name).detach() - before[name]
        size = float(moved.square().mean().sqrt()) / config.muon_lr
        assert size == pytest.approx(0.2, rel=0.2), (name, tuple(moved.shape))
        shapes.add(max(moved.shape) / min(moved.shape))
    assert max(shapes) > 2 * min(shapes)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_goes_over_by_name_into_a_fresh_optimizer(name: str) -> None:
    def step(model: torch.nn.Module, optimizer: object, seed: int) -> None:
        tokens = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(seed))
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = tiny_model(dropout=0.0)
    optimizer = build_optimizer(first, optimizer_config(name))
    for seed in range(3):
        step(first, optimizer, seed)
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    assert {key.split("/")[1] for key in state} == set(dict(first.named_parameters()))

    second = tiny_model(seed=5, dropout=0.0)
    second.load_state_dict(first.state_dict())
    other = build_optimizer(second, optimizer_config(name))
    other.load_state_dict(dict(reversed(state.items())))
    for model, chosen in ((first, optimizer), (second, other)):
        step(model, chosen, 9)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(optimizer_config(), name="sgd"), "choose adamw or muon"),
        (dataclasses.replace(optimizer_config(), muon_lr=0.1), "mean nothing to optimizer=adamw"),
        (dataclasses.replace(optimizer_config("muon"), muon_lr=None), "muon_lr=None must be above 0"),
        (dataclasses.replace(optimizer_config("muon"), muon_momentum=1.0), "muon_momentum=1.0"),
    ],
)
def test_an_impossible_configuration_is_refused_in_one_sentence(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(tiny_model(), config)


def test_without_muon_in_torch_the_choice_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"needs torch.optim.Muon.*use torch 2.11"):
        build_optimizer(tiny_model(), optimizer_config("muon"))
