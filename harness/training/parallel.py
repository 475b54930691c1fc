"""Several processes that train one run: torchrun starts them, torch's DDP or FSDP2 keeps their weights together.

Each process computes its share of every global batch; gradients are averaged, so that the weights after a step are those
that one process would have reached, up to the order of sums. Checkpoints hold whole tensors, whichever engine and however
many processes wrote them. Which process this is comes from torchrun's environment, read once, by `open_workers`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeGuard, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.config.schema import ParallelConfig, TrainConfig
from harness.errors import UserError
from harness.files.text import differing, first_few
from harness.training.device import seed_everything, select_device
from modeling.compiling import compile_each
from modeling.gpt import GPT

if TYPE_CHECKING:  # half a second, which one process alone need not wait for
    from torch.distributed.tensor import DTensor

Outcome = TypeVar("Outcome")
ENGINES = ("ddp", "fsdp")
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# One step, evaluation or checkpoint of the first process may take so long before the others take it for dead.
STEP_TIMEOUT = timedelta(minutes=30)
# So may what the first process does alone before training, the preparation of a large corpus above all.
ALONE_TIMEOUT = timedelta(hours=24)
RESTART_PATIENCE = 60.0  # seconds that a restarted run waits for the lock of the process it replaces


@dataclass(frozen=True)
class Workers:
    """This process among those that train the run. Made by `open_workers`."""

    rank: int
    world_size: int
    device: torch.device
    restarts: int  # by torchrun, since the command was given
    control: dist.ProcessGroup | None  # gloo on the CPU, for decisions; None with one process
    may_restart: bool = False
    local_rank: int = 0  # among those of its machine

    @property
    def is_first(self) -> bool:
        """The one process that decides, writes and speaks."""
        return self.rank == 0

    @property
    def patience(self) -> float:
        """Seconds to wait for a lock that a killed process may still hold."""
        return RESTART_PATIENCE if self.restarts else 0.0

    def first(self, action: Callable[[], Outcome]) -> Outcome:
        """`action` done by the first process alone; what it returned is returned in all.

        What it raises is raised in the first process; the others then leave with status 2 and say nothing.
        """
        if self.control is None:
            return action()
        told: list[Any] = [False, None]
        if self.is_first:
            try:
                told = [True, action()]
            finally:
                dist.broadcast_object_list(told, src=0, group=self.control)
        else:
            dist.broadcast_object_list(told, src=0, group=self.control)
            if not told[0]:
                self.leave()
        outcome: Outcome = told[1]
        return outcome

    def in_turn(self, action: Callable[[], Outcome]) -> Outcome:
        """`action` done by the first process, as `first` does it, then by the first of each other machine, whose files may be
        others, and then by the rest: to each what its own returned."""
        done: list[Outcome] = []
        self.first(lambda: done.append(action()))
        if not done and self.local_rank == 0:
            done.append(action())
        if self.control is not None:
            dist.barrier(group=self.control)
        return done[0] if done else action()

    def leave(self) -> NoReturn:
        """End this process, which is not the first, with status 2, and after the first: it says why.

        torchrun ends all processes when one of them leaves.
        """
        with contextlib.suppress(RuntimeError):
            dist.barrier(group=self.control)
        raise SystemExit(2)

    def any(self, flag: bool) -> bool:
        """Is it true in any process? Asked by all at the same place, answered alike in all."""
        return bool(self.total(np.array([float(flag)]))[0])

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sums of float64 values over all processes."""
        if self.control is None:
            return values
        summed = torch.from_numpy(values.copy())
        dist.all_reduce(summed, group=self.control)
        result: NDArray[np.float64] = summed.numpy()
        return result

    def seed_apart(self, seed: int, step: int) -> None:
        """Give every process but the first a generator of its own (dropout), a function of seed, step and rank alone.

        Called after a checkpoint has been written or loaded: a checkpoint holds the first process's generators only.
        """
        if not self.is_first:
            digest = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
            seed_everything(int.from_bytes(digest[:7], "little"))


@contextlib.contextmanager
def open_workers(device_name: str, fields: Mapping[str, Any] | None = None) -> Iterator[Workers]:
    """The processes that torchrun started, connected, each with its device; without torchrun, this process alone.

    fields: JSON-able, of this process; they must be alike in all. Raises UserError in the first process when they are not
    (the others leave as in `Workers.first`), and when the machine lacks the device, or one for each process.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if any(name not in os.environ for name in TORCHRUN) or os.environ["WORLD_SIZE"] == "1":
        yield Workers(0, 1, select_device(device_name), restarts, None, may_restart)
        return

    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if torch.cuda.is_available() and device_name in ("auto", "cuda"):
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started process {local_rank + 1} of this machine, which has {torch.cuda.device_count()} "
                f"GPUs: lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    device = select_device(device_name)
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"device={device.type} cannot be shared by {world_size} processes: set device=cpu")
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    if os.environ["LOCAL_WORLD_SIZE"] == str(world_size):
        # torchrun's plain rendezvous keeps one store over all restarts, with the addresses of killed processes in it.
        store = dist.PrefixStore(f"restart-{restarts}", store)
    _check_alike(store, rank, world_size, fields or {})
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=STEP_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=ALONE_TIMEOUT)
    assert isinstance(control, dist.ProcessGroup)
    # After an error nothing is taken down in order, which would wait for the others: torchrun ends them.
    yield Workers(rank, world_size, device, restarts, control, may_restart, local_rank)
    dist.barrier(group=control)
    dist.destroy_process_group()


def _check_alike(store: dist.Store, rank: int, world_size: int, fields: Mapping[str, Any]) -> None:
    """By way of the store, before anything is connected: processes that differ might not even find each other."""
    if rank > 0:
        store.set(f"fields-{rank}", json.dumps(fields))
        if store.get("alike") != b"yes":
            # torchrun ends all processes when the first of them leaves: that must be the one that says why.
            with contextlib.suppress(RuntimeError):
                store.wait(["never"], timedelta(seconds=10))
            raise SystemExit(2)
        return
    ours = json.loads(json.dumps(fields))
    for other in range(1, world_size):
        theirs = json.loads(store.get(f"fields-{other}"))
        if sentences := list(differing(theirs, ours).values()):
            store.set("alike", "no")
            raise UserError(
                f"process {other} was started with another configuration than process 0 ({first_few(sentences)}): start "
                f"all of them with the same arguments"
            )
    store.set("alike", "yes")


def check_parallel(config: TrainConfig, workers: Workers, precision: torch.dtype) -> None:
    """Raises UserError for what cannot be trained by these processes, before anything is built."""
    if config.overwrite and workers.may_restart:
        raise UserError(
            "overwrite=true would delete, at each restart, what torchrun --max-restarts is there to keep: leave one of "
            "the two out, or choose another name=..."
        )
    if workers.world_size == 1:
        return
    if config.batch_size % workers.world_size:
        raise UserError(
            f"batch_size={config.batch_size} cannot be shared by {workers.world_size} processes: make it a multiple of them"
        )
    if config.parallel.name == "fsdp" and config.optimizer.name == "muon":
        raise UserError(
            "optimizer=muon orthogonalises whole matrices, which parallel=fsdp does not have in one place: set "
            "parallel=ddp or optimizer=adamw"
        )
    if config.parallel.name == "fsdp" and config.parallel.mixed_precision and precision != torch.bfloat16:
        raise UserError(
            "parallel.mixed_precision=true gathers weights in bfloat16 and this run computes in float32: set "
            "precision=bfloat16 or parallel.mixed_precision=false"
        )


class LanguageModel(Protocol):
    """What the loop asks of a model."""

    training: bool

    def train(self) -> nn.Module: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean nats of the targets, differentiable."""


class OneProcess:
    """What the loop trains a model through: here the model as it is."""

    world_size = 1

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._parameters = list(model.parameters())

    def loss_of(self, compile: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of this process's part of a batch; its backward pass averages gradients over the processes."""
        return compile_each(self.model.loss) if compile else self.model.loss

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward pass of one micro-batch: only the last one's gradients travel."""
        return contextlib.nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients to a norm over all parameters; the norm before."""
        return nn.utils.clip_grad_norm_(self._parameters, max_norm)

    def mean(self, loss: Tensor) -> Tensor:
        """Over all processes."""
        if self.world_size == 1:
            return loss
        total = loss.clone()
        dist.all_reduce(total)  # gloo has no average
        return total / self.world_size


class Replicated(OneProcess):
    """DDP: every process holds all of the model and of the optimizer's state; gradients are averaged while they come."""

    model: GPT

    def __init__(self, model: GPT, workers: Workers) -> None:
        super().__init__(model)
        self.world_size = workers.world_size
        with warnings.catch_warnings():  # torch 2.13 calls broadcast_buffers old, 2.11 knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            self._parallel = DistributedDataParallel(
                _Loss(model),
                device_ids=[workers.device] if workers.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def loss_of(self, compile: bool) -> Callable[[Tensor, Tensor], Tensor]:
        if compile:
            compile_parts(self.model)
        return self._parallel

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self._parallel.no_sync()


class Sharded(OneProcess):
    """FSDP2: weights, gradients and optimizer state are cut over the processes; a block's weights are gathered to be used.

    After this the model's parameters are DTensors: the optimizer is built from them, not before.
    """

    model: GPT

    def __init__(self, model: GPT, workers: Workers, config: ParallelConfig) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(workers.device.type, (workers.world_size,))
        # The residual stream keeps its dtype; matrix products are in bfloat16 by autocast anyway.
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = mixed if config.mixed_precision else MixedPrecisionPolicy()
        # Gains in bfloat16 on float32 activations: the product is taken in float32, as without mixed precision.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        for group in sharing_groups(list(model.blocks)):
            fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
        fully_shard(model, mesh=mesh)
        for method in ("loss", "token_losses"):  # what is called instead of forward
            register_fsdp_forward_method(model, method)
        # Parameters are taken now: after a forward pass without a backward one the root's weights still lie there gathered.
        super().__init__(model)
        self.world_size = workers.world_size
        assert all(is_sharded(parameter) for parameter in self._parameters)

    def loss_of(self, compile: bool) -> Callable[[Tensor, Tensor], Tensor]:
        if compile:
            compile_parts(self.model)
        return self.model.loss

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]  # a method that fully_shard gave it
        yield

    def clip(self, max_norm: float) -> Tensor:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if is_sharded(norm) else norm
        nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm)
        return norm


def share_model(model: GPT, workers: Workers, config: ParallelConfig) -> OneProcess:
    """What the processes train `model` through, whose weights are the same in all."""
    if workers.world_size == 1:
        return OneProcess(model)
    return Sharded(model, workers, config) if config.name == "fsdp" else Replicated(model, workers)


def sharing_groups(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Consecutive blocks, those together that have parameters in common: FSDP gathers such weights once for all."""
    groups: list[list[nn.Module]] = []
    held: set[int] = set()
    for block in blocks:
        own = {id(parameter) for parameter in block.parameters()}
        if groups and own & held:
            groups[-1].append(block)
            held |= own
        else:
            groups.append([block])
            held = own
    return groups


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "device_mesh")


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors of sharded ones, one after the other, on the CPU; tensors that are whole as they are.

    Not torch.distributed.checkpoint.state_dict, which lets an optimizer without state make a step before it names that state.
    All processes take part; with keep=False the result is thrown away and empty.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            full = tensor.full_tensor().detach()
            if keep:
                whole[name] = full.cpu()
        elif keep:
            whole[name] = tensor
    return whole


def sharded_like(whole: Tensor, target: Tensor) -> Tensor:
    """This process's part of a whole tensor if `target` is sharded, else `whole` itself."""
    if not is_sharded(target) or whole.shape != target.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


class _Loss(nn.Module):
    """DDP prepares its gradients in forward."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.model.loss(inputs_BT, targets_BT)


def compile_parts(model: GPT) -> None:
    """Compile each block and the head for training.

    Not the whole loss at once: gradients then all come at its end and travel while nothing is left to compute, and FSDP's
    gathering between the blocks cannot be traced.
    """
    for part, name in (*((block, "forward") for block in model.blocks), (model, "head_loss")):
        setattr(part, name, _compiled_in_training(part, getattr(part, name)))


def _compiled_in_training(module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluation, whose batches have many shapes, stays as it is with one process."""
    compiled = compile_each(plain)

    def call(*arguments: Any) -> Any:
        return (compiled if module.training else plain)(*arguments)

    return call
