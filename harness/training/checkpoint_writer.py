"""Checkpoints written while training goes on: the state is copied at once, a thread writes the copy.

At most one is being written: the next save waits for it, and so does the end of training. What goes wrong in the thread
is raised in the training loop, at the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from harness.files.folders import step_folder
from harness.training.checkpoint import Snapshot, keep_as_best, write_checkpoint


class CheckpointWriter:
    """Writes a run's checkpoints into `folder` and keeps the newest `keep` of them."""

    def __init__(self, folder: Path, *, keep: int, background: bool) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if background else None
        self._writing: Future[None] | None = None
        self._host: dict[tuple[str, str], Tensor] = {}
        self.written: Callable[[], object] | None = None  # called after each checkpoint, where it was written

    def save(self, taken: Snapshot, *, is_best: bool = False) -> None:
        """Write a checkpoint; in the background, return as soon as its tensors have been copied.

        Raises what the checkpoint before this one met with, without the background also what this one does.
        """
        self.wait()
        if self._thread is None:
            self._write(taken, is_best)
        else:
            self._writing = self._thread.submit(self._write, self._copied(taken), is_best)

    def _write(self, taken: Snapshot, is_best: bool) -> None:
        write_checkpoint(self._folder, taken, keep=self._keep, is_best=is_best)
        if self.written is not None:
            self.written()

    def keep_as_best(self, step: int) -> None:
        """Keep the checkpoint of `step`, if it is there, as the best one."""
        self.wait()
        path = self._folder / step_folder(step)
        if path.is_dir():
            keep_as_best(path)

    @property
    def busy(self) -> bool:
        """Is a checkpoint being written?"""
        return self._writing is not None and not self._writing.done()

    def check(self) -> None:
        """Raise what went wrong in the background, if it has come to its end."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written any more. Raises what went wrong there, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait without raising, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _copied(self, taken: Snapshot) -> Snapshot:
        """The snapshot in host memory that the next one uses again: fresh pages cost as much as the copy itself."""
        tensors: dict[str, dict[str, Tensor]] = {}
        devices: set[torch.device] = set()
        for file, part in taken.tensors.items():
            tensors[file] = {}
            for name, tensor in part.items():
                host = self._host.get((file, name))
                if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                    on_gpu = tensor.device.type == "cuda"
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
                    self._host[file, name] = host
                devices.add(tensor.device)
                host.copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
                tensors[file][name] = host
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return Snapshot(tensors, taken.content)
