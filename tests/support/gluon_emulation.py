"""Runs the source of a Gluon kernel for Hopper on a CPU: its partitions as threads that take turns at random.

Triton's interpreter does not know Gluon. Here every function of a kernel's module is executed as Python over torch tensors,
with what makes such a kernel wrong on a GPU left in: barriers count arrivals and bytes and have phases; a copy destroys its
target when it begins and fills it at some later time; a product reads its operands at some time until it is waited for.
So a buffer that is released too early, a phase that is off by one or a barrier that nobody reaches shows as a NaN or as a
deadlock, in one order of events or another: `seed` chooses the order. What it does not know: layouts, registers, fences
the time that anything takes, and assembly: a function that holds some has a stand-in in torch.
"""

from __future__ import annotations

import functools
import math
import random
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Stopped(BaseException):
    """Ends a partition's thread where another one has failed."""


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1, nbytes: int = 0) -> None:
        assert self.count, "a barrier is used before it is made"
        self.bytes += nbytes
        self.pending -= count
        assert self.pending >= 0, "more arrivals than a barrier's phase expects"
        self._turn()

    def complete(self, nbytes: int) -> None:
        self.bytes -= nbytes
        self._turn()

    def passed(self, phase: int) -> bool:
        """Whether the phase of this parity is over: of a new barrier, the one before its first."""
        return (self.phase & 1) != int(phase)

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Shared:
    """Shared memory: a tensor, or barriers. Who reads or writes it lets others go first."""

    def __init__(self, content: Any, rest: Callable[[], None]) -> None:
        self.content, self.rest = content, rest

    @property
    def dtype(self) -> Any:
        return self.content.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.content[int(i)], self.rest)

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.content.narrow(dim, start, length), self.rest)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.content.permute(*order), self.rest)

    def load(self, layout: object) -> Tensor:
        self.rest()
        return self.content.clone()

    def store(self, value: Tensor) -> None:
        self.rest()
        assert value.shape == self.content.shape and value.dtype == self.content.dtype, (value.shape, value.dtype)
        self.content.copy_(value)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        return Shared(self.content.view(dtype).view(*shape), self.rest)

    @property
    def barrier(self) -> Barrier:
        return self.content if isinstance(self.content, Barrier) else self.content[0]


class Pointer:
    """An address in a tensor's storage, or a tensor of them, in elements."""

    def __init__(self, flat: Tensor, offset: Any = 0) -> None:
        self.flat, self.offset = flat, offset
        self.dtype = types.SimpleNamespace(element_ty=flat.dtype)

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        """The address of a tensor's first element; what is written is written to the tensor."""
        storage = tensor.untyped_storage()
        flat = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.itemsize,))
        return cls(flat, tensor.storage_offset())

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.offset + more)


class Descriptor:
    """What the copy engine knows of a tensor: its shape, beyond which it writes zeros, and the block that it copies."""

    def __init__(self, base: Tensor, block_shape: Sequence[int]) -> None:
        self.base, self.dtype, self.layout = base, base.dtype, None
        self.block_type = types.SimpleNamespace(shape=list(block_shape))

    def block(self, place: Sequence[Any]) -> Tensor:
        block = torch.zeros(*self.block_type.shape, dtype=self.dtype)
        starts = [int(first) for first in place]
        ends = [first + size for first, size in zip(starts, block.shape, strict=True)]
        within = [slice(max(a, 0), max(0, min(b, size))) for a, b, size in zip(starts, ends, self.base.shape, strict=True)]
        found = self.base[tuple(within)]
        to = [slice(part.start - a, part.start - a + n) for part, a, n in zip(within, starts, found.shape, strict=True)]
        block[tuple(to)] = found
        return block


class Product:
    """A product under way; `value` once it is made."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make, self.value = make, None

    def finish(self) -> None:
        self.value = self.make()


class Partition:
    """A group of warps: a thread that runs when it is its turn, and its products under way."""

    def __init__(self, function: Callable[..., None], arguments: Sequence[Any]) -> None:
        self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[Product] = []
        self.done, self.stopped, self.error = False, False, None

        def run() -> None:
            self.turn.acquire()
            try:
                if not self.stopped:
                    function(*arguments)
            except Stopped:
                pass
            except BaseException as error:
                self.error = error
            self.done = True
            self.back.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def step(self) -> None:
        self.turn.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error

    def rest(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Called in its thread: others go on, until this one is chosen again."""
        self.ready = ready
        self.back.release()
        self.turn.acquire()
        if self.stopped:
            raise Stopped


class Program:
    """One program of a launch: its partitions and its copies under way."""

    def __init__(self, place: tuple[int, int, int], seed: int) -> None:
        self.place, self.random = place, random.Random(f"{place} {seed}")
        self.speeds: dict[object, float] = {}  # of each partition, of copies and of products: very unlike ones
        self.partitions: list[Partition] = []
        self.copies: list[Callable[[], None]] = []

    @property
    def current(self) -> Partition:
        return next(each for each in self.partitions if each.thread is threading.current_thread())

    def specialize(
        self, functions: Sequence[tuple[Callable[..., None], Sequence[Any]]], warps: object, registers: object
    ) -> None:
        self.partitions = [Partition(function, arguments) for function, arguments in functions]
        try:
            while not all(each.done for each in self.partitions):
                able: dict[Callable[[], None], object] = {
                    each.step: each for each in self.partitions if not each.done and each.ready()
                }
                able |= {functools.partial(self._copy, copy): "copies" for copy in self.copies}
                able |= {functools.partial(self._multiply, each): "products" for each in self.partitions if each.products}
                assert able, f"program {self.place}: every partition waits for another"
                speeds = [self.speeds.setdefault(who, 10 ** -self.random.uniform(0, 2)) for who in able.values()]
                self.random.choices(list(able), speeds)[0]()
        finally:
            for each in self.partitions:
                while not each.done:
                    each.stopped = True
                    each.turn.release()
                    each.back.acquire()
        assert not self.copies, "a copy is still under way when the program ends"
        assert not any(each.products for each in self.partitions), "nobody waits for a product"

    def _copy(self, copy: Callable[[], None]) -> None:
        self.copies.remove(copy)
        copy()

    def _multiply(self, partition: Partition) -> None:
        partition.products.pop(0).finish()  # a warpgroup's products follow each other

    def rest(self) -> None:
        """Let others go first, where there are any: before the partitions there are none."""
        if self.partitions:
            self.current.rest()

    # --- what a kernel calls ---------------------------------------------------------------------------------------------

    def wait(self, bar: Shared, phase: int) -> None:
        if not self.partitions:
            assert bar.barrier.passed(phase), "before the partitions nobody else could end this wait"
            return
        self.current.rest(lambda: bar.barrier.passed(phase))

    def arrive(self, bar: Shared, *, count: int = 1) -> None:
        bar.barrier.arrive(count)
        self.current.rest()

    def fetch(self, source: Descriptor, place: Sequence[Any], full: Shared, target: Shared) -> None:
        block = source.block(place)
        assert block.shape == target.content.shape
        target.content.fill_(garbage(block.dtype))

        def arrived() -> None:
            target.content.copy_(block)
            full.barrier.complete(block.nbytes)

        self.copies.append(arrived)
        self.rest()

    def multiply(self, a: Any, b: Shared, sums: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        assert is_async, "the kernels here wait for their products themselves"

        def make() -> Tensor:
            first = a.content if isinstance(a, Shared) else a
            made = first.float() @ b.content.float()
            return made + (sums.value if isinstance(sums, Product) else sums) if use_acc else made

        product = Product(make)
        self.current.products.append(product)
        self.current.rest()
        return product

    def wait_for_products(self, outstanding: int, *, deps: Sequence[Any]) -> Any:
        self.current.rest()
        while len(self.current.products) > outstanding:
            self.current.products.pop(0).finish()
        found = [each.value if isinstance(each, Product) and each.value is not None else each for each in deps]
        return found[0] if len(found) == 1 else tuple(found)


def garbage(dtype: torch.dtype) -> float:
    """What stands where nothing was written yet: NaN, or a large number where there is none."""
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _load(place: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    offset = _tensor(place.offset)
    if mask is None:
        return place.flat[offset]
    mask = mask.expand(offset.shape)
    found = torch.full(offset.shape, other, dtype=place.flat.dtype)
    found[mask] = place.flat[offset[mask]]
    return found


def _store(place: Pointer, value: Tensor, mask: Tensor) -> None:
    mask = mask.expand(place.offset.shape)
    place.flat[place.offset[mask]] = value.expand(place.offset.shape)[mask].to(place.flat.dtype)


def _language(program: Program, real: Any) -> types.SimpleNamespace:
    def allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        content: Any = None if dtype == torch.int64 else torch.full(tuple(shape), garbage(dtype), dtype=dtype)
        if dtype == torch.int64:
            content = [[Barrier()] for _ in range(shape[0])] if len(shape) > 1 else [Barrier()]
        return Shared(content, program.rest)

    layouts = {name: getattr(real, name) for name in dir(real) if name.endswith("Layout")}
    return types.SimpleNamespace(
        **layouts,
        **{
            name: getattr(torch, name)
            for name in ("float32", "float16", "int8", "int32", "int64", "exp2", "log2", "where", "abs", "floor")
        },
        program_id=lambda axis: torch.tensor(program.place[axis]),
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(*shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(tuple(shape), value, dtype=dtype),
        convert_layout=lambda value, layout: value,
        minimum=lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
        maximum=lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
        cdiv=lambda a, b: -(-a // b),
        max=lambda value, axis: value.amax(axis),
        sum=lambda value, axis: value.sum(axis),
        static_range=range,
        load=_load,
        store=_store,
        allocate_shared_memory=allocate,
        warp_specialize=program.specialize,
    )


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    *arguments: Any,
    seed: int,
    stand_ins: Mapping[str, Callable[..., Any]] | None = None,
    **constants: Any,
) -> None:
    """Run the kernel of a module for every program of a grid. Tensors are pointers to their first element.

    stand_ins: by name, what is called in place of a function of the module that holds assembly.
    """
    module = kernel.fn.__globals__
    taken = [Pointer.to(each) if isinstance(each, Tensor) else each for each in arguments]
    for place in ((x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])):
        program = Program(place, seed)
        scope = {
            name: getattr(value, "value", value) if type(value).__name__ == "constexpr" else value
            for name, value in module.items()
        }
        scope |= {
            "gl": _language(program, module["gl"]),
            "mbarrier": types.SimpleNamespace(
                init=lambda bar, count: bar.barrier.init(count),
                expect=lambda bar, nbytes: bar.barrier.arrive(1, int(nbytes)),
                arrive=program.arrive,
                wait=program.wait,
                MBarrierLayout=lambda: None,
            ),
            "tma": types.SimpleNamespace(async_copy_global_to_shared=program.fetch),
            "warpgroup_mma": program.multiply,
            "warpgroup_mma_wait": program.wait_for_products,
            "fence_async_shared": lambda: None,
        }
        for name, value in module.items():
            if type(value).__name__ == "GluonJITFunction":
                scope[name] = types.FunctionType(value.fn.__code__, scope, name, value.fn.__defaults__)
        scope |= stand_ins or {}
        scope[kernel.fn.__name__](*taken, **constants)
