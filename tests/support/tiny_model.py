"""A language model of a few hundred parameters that offers what training and evaluation ask of the real one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config.schema import OptimizerConfig
from harness.training.checkpoint import DamagedCheckpoint, snapshot, verified, write_checkpoint
from harness.training.optimizer import Optimizer

VOCAB, WIDTH = 11, 8


class TinyModel(nn.Module):
    """The next token from this one and the running mean of all so far; with dropout, a norm, biases and a tied head."""

    def __init__(self, *, dropout: float = 0.1, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def logits(self, inputs_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(inputs_BT)
        count_T1 = torch.arange(1, x_BTD.shape[1] + 1, device=x_BTD.device)[:, None]
        x_BTD = x_BTD + x_BTD.cumsum(dim=1) / count_T1
        for block in self.blocks:
            x_BTD = x_BTD + self.dropout(torch.tanh(block(x_BTD)))
        return self.head(self.norm(x_BTD))

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(inputs_BT).flatten(0, 1), targets_BT.flatten())

    def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTC = self.logits(inputs_BT)
        return F.cross_entropy(logits_BTC.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)


def tiny_model(seed: int = 0, *, dropout: float = 0.1, tie: bool = True) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel(dropout=dropout, tie=tie)


def tiny_batches(first_step: int, *, rows: int = 6, length: int = 9) -> Iterator[Tensor]:
    """Batch n is a function of n alone, as the real loader's."""
    step = first_step
    while True:
        yield torch.randint(VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(step))
        step += 1


def optimizer_config(name: str = "adamw", *, lr: float = 0.01, weight_decay: float = 0.1) -> OptimizerConfig:
    muon = name == "muon"
    return OptimizerConfig(
        name=name,
        lr=lr,
        betas=[0.9, 0.95],
        eps=1e-8,
        weight_decay=weight_decay,
        grad_clip=1.0,
        muon_lr=0.02 if muon else None,
        muon_momentum=0.95 if muon else None,
    )


def save_checkpoint(folder: Path, *, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], keep: int = 2) -> Path:
    """As a run does after a step. state is JSON-able and holds the step."""
    return write_checkpoint(folder, snapshot(model, optimizer, state), keep=keep)


def find_damage(path: Path) -> str | None:
    """What is wrong with the checkpoint in a folder, None if nothing."""
    try:
        verified(path)
    except DamagedCheckpoint as error:
        return error.reason
    return None
