"""AdamW (arXiv 1711.05101), or Muon (arXiv 2502.16982) for the blocks' matrices beside AdamW for everything else.

With optimizer.width_base the blocks' matrices of a model of width D take width_base / D of their rate, and everything else the
rate as it stands: a rate found at one width then serves others (Yang et al. 2022, arXiv 2203.03466, table 3, for Adam). The
initial values that go with it are model.init=fan_in and model.init_std in proportion to 1 / sqrt(D).

Whichever it is, the loop sees one Optimizer whose state is keyed by parameter names, so that a checkpoint can be loaded
on any device and one of other settings is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.schema import OptimizerConfig
from harness.errors import UserError
from harness.training.parallel import sharded_like


class Optimizer:
    """One or two torch optimizers stepped as one. Each param group holds its peak rate as `peak_lr`."""

    def __init__(self, parts: list[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> None:
        self._parts = parts
        self._names = names
        for part in parts:
            _kept(part, part.param_groups[0], (2, 2))  # before training: what cannot be saved is known now
        for group in self._groups():
            group["peak_lr"] = group["lr"]
            if group.get("capturable"):  # a captured update reads the rate where it lies
                group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)

    def _groups(self) -> Iterable[dict[str, Any]]:
        return (group for part in self._parts for group in part.param_groups)

    def set_lr(self, factor: float) -> float:
        """Set every rate to factor x its peak; returns the first group's, which is AdamW's."""
        for group in self._groups():
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["peak_lr"] * factor)
            else:
                group["lr"] = group["peak_lr"] * factor
        first: float = self._parts[0].param_groups[0]["peak_lr"]
        return first * factor

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def settings(self) -> list[dict[str, Any]]:
        """Per group, JSON-able: which optimizer, its peak rate and decay, and the names of its parameters."""
        return [
            {
                "optimizer": type(part).__name__,
                "peak_lr": group["peak_lr"],
                "weight_decay": group.get("weight_decay", 0.0),
                "parameters": [self._names[parameter] for parameter in group["params"]],
            }
            for part in self._parts
            for group in part.param_groups
        ]

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what `state_dict` gives after a step, the whole of what is sharded."""
        found: dict[str, tuple[int, ...]] = {}
        for part in self._parts:
            for group in part.param_groups:
                kept = {shape: _kept(part, group, shape) for shape in {parameter.shape for parameter in group["params"]}}
                for parameter in group["params"]:
                    found |= {f"{key}/{self._names[parameter]}": shape for key, shape in kept[parameter.shape].items()}
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors, keyed `<state>/<parameter name>` (exp_avg/blocks.0.mlp.up_proj.weight).

        They are sharded if the parameters are.
        """
        return {
            f"{key}/{self._names[parameter]}": value
            for part in self._parts
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, whole, moved to the parameters' devices and cut as they are."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        by_name: dict[str, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            key, name = path.split("/", 1)
            assert name in parameters, "the state belongs to another model"
            by_name.setdefault(name, {})[key] = sharded_like(tensor, parameters[name])
        for part in self._parts:
            # torch numbers parameters in the order of the groups; its own loader puts each state where the update wants
            # it (the step count of a plain AdamW stays on the CPU, a fused one's moves to the device).
            own = [parameter for group in part.param_groups for parameter in group["params"]]
            state = {i: by_name[self._names[p]] for i, p in enumerate(own) if self._names[p] in by_name}
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def _kept(part: torch.optim.Optimizer, group: Mapping[str, Any], shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shapes of what a torch optimizer keeps of a parameter of that shape in a group, seen on one that steps once.

    Raises TypeError for what is no tensor, which a checkpoint does not hold.
    """
    trial = nn.Parameter(torch.zeros(shape))
    trial.grad = torch.zeros(shape)
    taken = inspect.signature(type(part)).parameters.keys() - {"capturable"}  # the trial is on the CPU
    options = {key: value for key, value in group.items() if key in taken - {"params"}} | {"lr": 0.0}
    alone = type(part)([trial], **options)
    alone.step()
    state = alone.state[trial]
    if odd := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise TypeError(
            f"{type(part).__name__} keeps {odd[0]} as a {type(state[odd[0]]).__name__}, and a checkpoint holds tensors: "
            f"make it one"
        )
    return {key: tuple(value.shape) for key, value in state.items()}


@dataclass(frozen=True)
class Weights:
    """A model's trained parameters by what an optimizer may do to them, each list in the model's order."""

    vectors: list[Tensor]  # norms, biases and embedding tables (a tied head is one): no weight decay
    matrices: list[Tensor]  # all others
    hidden: list[Tensor]  # those matrices that lie in the blocks
    width: int  # d_model

    def hidden_share(self, config: OptimizerConfig) -> float:
        """What the blocks' matrices take of their rate."""
        return 1.0 if config.width_base is None else config.width_base / self.width


@dataclass(frozen=True)
class Recipe:
    """One choice of optimizer.name. build's last argument: the update is to be recorded in a CUDA graph, its rates are then
    tensors on the device; where it can be."""

    check: Callable[[OptimizerConfig], None]  # UserError for settings that cannot work
    build: Callable[[Weights, OptimizerConfig, bool], list[torch.optim.Optimizer]]  # the first one's rate is logged
    can_be_captured: bool = False


def choose_recipe(config: OptimizerConfig) -> Recipe:
    """That of the optimizer which config names. Raises UserError for settings that do not fit it."""
    if config.name not in OPTIMIZERS:
        raise UserError(f"optimizer.name={config.name} is unknown: choose {' or '.join(OPTIMIZERS)}")
    recipe = OPTIMIZERS[config.name]
    recipe.check(config)
    return recipe


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, recipe: Recipe | None = None, capturable: bool = False
) -> Optimizer:
    """The optimizer of a recipe (None: that of `choose_recipe`) over all trained parameters of `model` where they lie."""
    recipe = recipe or choose_recipe(config)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = {id(module.weight) for module in embeddings}
    matrices = [p for p in names if p.ndim >= 2 and id(p) not in tables]
    decayed = set(matrices)
    weights = Weights(
        vectors=[p for p in names if p not in decayed],
        matrices=matrices,
        hidden=[p for p in matrices if p.ndim == 2 and names[p].startswith("blocks.")],
        width=embeddings[0].embedding_dim,
    )
    return Optimizer(recipe.build(weights, config, capturable), names)


def _adamw(
    weights: Weights, matrices: list[Tensor], config: OptimizerConfig, capturable: bool, *, share: float = 1.0
) -> torch.optim.AdamW:
    """AdamW over the vectors and some matrices, those of the blocks at `share` of the rate."""
    narrowed = set(weights.hidden) if share != 1.0 else set()
    groups = [
        {"params": weights.vectors, "weight_decay": 0.0},
        {"params": [p for p in matrices if p not in narrowed], "weight_decay": config.weight_decay},
        {"params": [p for p in matrices if p in narrowed], "weight_decay": config.weight_decay, "lr": share * config.lr},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        capturable=capturable,
        fused=True,  # one kernel for all: on two CPU cores and 1.3M parameters 1.1 ms a step, where foreach takes 5.0
    )


def _build_adamw(weights: Weights, config: OptimizerConfig, capturable: bool) -> list[torch.optim.Optimizer]:
    return [_adamw(weights, weights.matrices, config, capturable, share=weights.hidden_share(config))]


def _check_adamw(config: OptimizerConfig) -> None:
    if config.muon_lr is not None or config.muon_momentum is not None:
        raise UserError("optimizer.muon_lr and muon_momentum mean nothing to optimizer=adamw: leave them out")


def _build_muon(weights: Weights, config: OptimizerConfig, capturable: bool) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; embeddings, head and vectors stay with AdamW."""
    assert config.muon_lr is not None and config.muon_momentum is not None
    hidden = set(weights.hidden)
    muon = torch.optim.Muon(
        weights.hidden,
        lr=config.muon_lr * weights.hidden_share(config),
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",  # updates of AdamW's size, whatever the matrix's shape
    )
    return [_adamw(weights, [p for p in weights.matrices if p not in hidden], config, capturable), muon]


def _check_muon(config: OptimizerConfig) -> None:
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer=muon needs torch.optim.Muon, which torch {torch.__version__} lacks: use torch 2.11")
    if config.muon_lr is None or config.muon_lr <= 0.0:
        raise UserError(f"optimizer.muon_lr={config.muon_lr} must be above 0: it is the rate of the blocks' matrices")
    if config.muon_momentum is None or not 0.0 <= config.muon_momentum < 1.0:
        raise UserError(f"optimizer.muon_momentum={config.muon_momentum} must be in [0, 1), such as 0.95")


OPTIMIZERS = {"adamw": Recipe(_check_adamw, _build_adamw, can_be_captured=True), "muon": Recipe(_check_muon, _build_muon)}
