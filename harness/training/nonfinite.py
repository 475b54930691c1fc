"""Numbers that go wrong: which steps make no update, when training gives up, and where a bad number first appears.

A loss or a gradient norm that is not finite, or with spikes.sigma one that is more than so many standard deviations above
its mean over the last accepted steps, spoils the weights for good once an optimizer has taken it in.
"""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.training.device import generators, set_generators


class NonFiniteError(UserError):
    """A step whose update is not made, so that the weights are those of the step before."""

    def __init__(self, sentence: str, *, step: int, batch: Tensor) -> None:
        super().__init__(sentence)
        self.step, self.batch = step, batch


class Guard:
    """Decides step by step whether an update is made. Its memory is part of a run's state: `state` and `restore`.

    skip: steps with a number that is not finite are skipped; otherwise they stop training. sigma: None, or steps that
    spike by more than that are skipped. window: accepted steps that a spike is measured against; before so many have
    been made nothing is a spike. limit: skipped steps in a row after which training gives up.
    """

    def __init__(self, *, skip: bool = False, sigma: float | None = None, window: int = 100, limit: int = 10) -> None:
        self._skip, self._sigma, self._limit = skip, sigma, limit
        self.skipped, self._in_a_row = 0, 0
        self._losses: collections.deque[float] = collections.deque(maxlen=window)
        self._norms: collections.deque[float] = collections.deque(maxlen=window)

    @property
    def may_skip(self) -> bool:
        return self._skip or self._sigma is not None

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """None: make the update, the step is accepted. A reason: do not; then ask `ending`."""
        if not _finite(loss, grad_norm):
            return f"the loss is {loss:.6g} and the gradient norm {grad_norm:.6g}"
        spike = self._spike("loss", loss, self._losses) or self._spike("gradient norm", grad_norm, self._norms)
        if spike is None:
            self._in_a_row = 0
            if self._sigma is not None:
                self._losses.append(loss)
                self._norms.append(grad_norm)
        return spike

    def ending(self, loss: float, grad_norm: float) -> str | None:
        """Why training ends with this bad step; None: it goes on, and the step counts as skipped."""
        if not self._skip and not _finite(loss, grad_norm):
            return "stopped before the update"
        if self._in_a_row + 1 >= self._limit:
            return f"{self._limit} steps in a row made no update (skip_limit), stopped before the next"
        self._in_a_row += 1
        self.skipped += 1
        return None

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "losses": list(self._losses), "norms": list(self._norms)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state`."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        for kept, values in ((self._losses, state["losses"]), (self._norms, state["norms"])):
            kept.clear()
            kept.extend(values)

    def _spike(self, name: str, value: float, last: collections.deque[float]) -> str | None:
        if self._sigma is None or len(last) < (last.maxlen or 0):
            return None
        mean, deviation = statistics.fmean(last), statistics.pstdev(last)
        if value <= mean + self._sigma * deviation:
            return None
        return (
            f"the {name} is {value:.6g}, more than {self._sigma:g} standard deviations above {mean:.6g}, its mean over "
            f"the last {len(last)} steps"
        )


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


@dataclass(frozen=True)
class FirstNonFinite:
    """Where a number that is not finite first appears: in words, and in which rows of the batch (all: not known)."""

    where: str
    rows: list[int]


def locate(
    model: nn.Module, batch: Tensor, *, micro_batch_size: int, precision: torch.dtype, device: torch.device
) -> FirstNonFinite | None:
    """Compute the step once more, uncompiled and watched, and find its first number that is not finite.

    The generators must stand where they stood before the step; they and the weights are left as they are. None: it does
    not appear again. batch: (B, T+1) token ids. model: what `train` takes.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return FirstNonFinite(f"the parameter {name}, before the step", list(range(len(batch))))
    before = generators(device)
    try:
        for start in range(0, len(batch), micro_batch_size):
            micro = batch[start : start + micro_batch_size]
            everything = list(range(start, start + len(micro)))
            found: list[FirstNonFinite] = []
            with _watched(model, found, start, everything):
                with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                    loss = model.loss(micro[:, :-1], micro[:, 1:])  # type: ignore[operator]
                if not found and not math.isfinite(loss.item()):
                    found.append(FirstNonFinite("the loss, after modules whose outputs are all finite", everything))
                if not found:
                    (loss * (len(micro) / len(batch))).backward()
            if found:
                return found[0]
        return None
    finally:
        model.zero_grad(set_to_none=True)
        set_generators(before, device)


@contextlib.contextmanager
def _watched(model: nn.Module, found: list[FirstNonFinite], start: int, everything: list[int]) -> Iterator[None]:
    """Inside, the first bad output of a module and the first bad gradient, in the order of computation, go to `found`."""
    handles: list[Any] = []

    def watch(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or found:
                    continue
                if not bool(torch.isfinite(tensor).all()):
                    found.append(FirstNonFinite(f"the output of {name}", _bad_rows(tensor, start, everything)))
                elif tensor.requires_grad:
                    handles.append(tensor.register_hook(look_at_gradient(f"the gradient of the output of {name}")))

        return look

    def look_at_gradient(name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if not found and not bool(torch.isfinite(gradient).all()):
                found.append(FirstNonFinite(name, everything))

        return look

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(watch(name)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(look_at_gradient(f"the gradient of {name}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bad_rows(tensor: Tensor, start: int, everything: list[int]) -> list[int]:
    """The rows of the batch that hold a bad number, where the tensor's first dimension is the batch."""
    if tensor.ndim < 2 or len(tensor) != len(everything):
        return everything
    bad_B = ~torch.isfinite(tensor).flatten(1).all(dim=1)
    return [start + row for row in bad_B.nonzero().flatten().tolist()]
