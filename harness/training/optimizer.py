"""AdamW (arXiv 1711.05101), or Muon (arXiv 2502.16982) for the blocks' matrices beside AdamW for everything else.

Whichever it is, the loop sees one Optimizer whose state is keyed by parameter names, so that a checkpoint can be loaded
on any device and one of other settings is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.schema import OptimizerConfig
from harness.training.parallel import sharded_like


class Optimizer:
    """One or two torch optimizers stepped as one. Each param group holds its peak rate as `peak_lr`."""

    def __init__(self, parts: list[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> None:
        self._parts = parts
        self._names = names
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def _groups(self) -> Iterable[dict[str, Any]]:
        return (group for part in self._parts for group in part.param_groups)

    def set_lr(self, factor: float) -> float:
        """Set every rate to factor x its peak; returns the first group's, which is AdamW's."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor
        lr: float = self._parts[0].param_groups[0]["lr"]
        return lr

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
                "weight_decay": group["weight_decay"],
                "parameters": [self._names[parameter] for parameter in group["params"]],
            }
            for part in self._parts
            for group in part.param_groups
        ]

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


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that config names, over all trained parameters of `model` on their present device.

    Weight decay falls on matrices only: not on norms, biases or embedding tables (a tied head is one). Muon takes the
    matrices of `model.blocks`; embeddings, head and vectors stay with AdamW. Raises UserError when the configuration
    does not fit the optimizer.
    """
    check_optimizer(config)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {p for p in names if p.ndim >= 2 and id(p) not in tables}
    hidden = {p for p in matrices if p.ndim == 2 and names[p].startswith("blocks.")} if config.name == "muon" else set()

    # Lists in the model's order, for sets of tensors have none that repeats.
    groups = [
        {"params": [p for p in names if p not in matrices], "weight_decay": 0.0},
        {"params": [p for p in names if p in matrices and p not in hidden], "weight_decay": config.weight_decay},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,  # one kernel for all: on two CPU cores and 1.3M parameters 1.1 ms a step, where foreach takes 5.0
    )
    parts: list[torch.optim.Optimizer] = [adamw]
    if config.name == "muon":
        assert config.muon_lr is not None and config.muon_momentum is not None
        parts.append(
            torch.optim.Muon(
                [p for p in names if p in hidden],
                lr=config.muon_lr,
                weight_decay=config.weight_decay,
                momentum=config.muon_momentum,
                adjust_lr_fn="match_rms_adamw",  # updates of AdamW's size, whatever the matrix's shape
            )
        )
    return Optimizer(parts, names)


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises UserError for settings that cannot work, before anything is built."""
    if config.name not in ("adamw", "muon"):
        raise UserError(f"optimizer.name={config.name} is unknown: choose adamw or muon")
    if config.lr <= 0.0:
        raise UserError(f"optimizer.lr={config.lr} trains nothing: give a rate above 0")
    if len(config.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in config.betas):
        raise UserError(f"optimizer.betas={config.betas} must be two numbers in [0, 1), such as [0.9, 0.95]")
    if config.eps <= 0.0 or config.weight_decay < 0.0 or config.grad_clip < 0.0:
        raise UserError(
            f"optimizer.eps={config.eps} must be above 0, weight_decay={config.weight_decay} and "
            f"grad_clip={config.grad_clip} at least 0 (0 switches them off)"
        )
    if config.name == "adamw":
        if config.muon_lr is not None or config.muon_momentum is not None:
            raise UserError("optimizer.muon_lr and muon_momentum mean nothing to optimizer=adamw: leave them out")
        return
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer=muon needs torch.optim.Muon, which torch {torch.__version__} lacks: use torch 2.11")
    if config.muon_lr is None or config.muon_lr <= 0.0:
        raise UserError(f"optimizer.muon_lr={config.muon_lr} must be above 0: it is the rate of the blocks' matrices")
    if config.muon_momentum is None or not 0.0 <= config.muon_momentum < 1.0:
        raise UserError(f"optimizer.muon_momentum={config.muon_momentum} must be in [0, 1), such as 0.95")
