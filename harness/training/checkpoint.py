"""Checkpoints: a folder step-00000100/ that is either whole and verified, or not used; best/ is one of them, kept.

    model.safetensors       every tensor of the model, a tied one once
    optimizer.safetensors   the optimizer's state, keyed by parameter name
    state.json              the caller's state, the random generators, the optimizer's settings
    manifest.json           size and SHA-256 of the other three

They are written into a hidden folder, the manifest last, flushed to the disk and renamed. Tensors and JSON only:
loading one never runs code. best/ holds the files of the step that validated best so far, as second names (hard links)
where the file system has them; it is never taken for the newest.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from harness.config.typed import typed
from harness.errors import UserError, in_a_line, readable, tell
from harness.files.atomic import check_room, flush
from harness.files.folders import BEST, checkpoint_folders, listed, mark, numbered_folders, remove, step_folder, step_of
from harness.files.hashes import file_sha256
from harness.files.untrusted import Unreadable, is_count, read_object
from harness.training.optimizer import Optimizer
from harness.training.parallel import gathered, sharded_like

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_DTYPES = ("F64", "F32", "BF16", "F16")  # what weights and moments are kept in
_UNREADABLE = "make it readable (is its disk failing?), or move it away to go on from the checkpoint before it"
_LEFTOVER = re.compile(r"\.partial-(?:removed-|replaced-)?(.+)")


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written. `reason`: why, in half a sentence."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"checkpoint {path} is damaged ({reason}): use another one")
        self.reason = reason


@dataclass(frozen=True)
class Checkpoint:
    """One that has been found whole, by `verified`, and what was read on the way: it is read once.

    state: the caller's. optimizer, generators: its settings and their states, None where weights alone were saved. shapes: of
    every tensor, by file, then by name.
    """

    path: Path
    state: dict[str, Any]
    optimizer: list[Any] | None
    generators: dict[str, Any] | None
    shapes: dict[str, dict[str, tuple[int, ...]]]
    manifest: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.path / MODEL


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, as it is now. `tensors`: by file, then by name."""

    tensors: dict[str, dict[str, Tensor]]
    content: dict[str, Any]

    @property
    def step(self) -> int:
        number: int = self.content["caller"]["step"]
        return number

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for part in self.tensors.values() for tensor in part.values())


def snapshot(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], *, keep: bool = True) -> Snapshot:
    """The state of a run without copying a tensor that is whole: training on changes it.

    state is JSON-able and holds the step. Of several processes all call this, since a sharded model's tensors are gathered
    here; with keep=False the tensors are thrown away.
    """
    return Snapshot(
        tensors={MODEL: gathered(unique_tensors(model), keep=keep), OPTIMIZER: gathered(optimizer.state_dict(), keep=keep)},
        content={"caller": dict(state), "optimizer": optimizer.settings(), "generators": _generator_states()},
    )


def write_checkpoint(folder: Path, taken: Snapshot, *, keep: int, is_best: bool = False) -> Path:
    """Write folder/step-<its step>, then delete the oldest ones beyond `keep`. Returns the new folder.

    is_best gives it the name best/ too. Raises UserError when the disk is too full, OSError when it cannot be written; older
    checkpoints stay intact.
    """
    assert keep >= 1

    def write(partial: Path) -> None:
        for name, part in taken.tensors.items():
            _write_tensors(part, partial / name)

    final = _save(folder, taken.content, write, taken.size)
    if is_best:
        keep_as_best(final)

    tidy(folder, newest=final, keep=keep)
    return final


def tidy(folder: Path, *, newest: Path, keep: int) -> None:
    """Delete what killed saves have left behind and the oldest checkpoints beyond `keep`, counted from `newest`."""
    if not newest.is_dir():  # the run's folder went away meanwhile, and another one may be in its place
        return
    mark(folder)
    _remove_leftovers(folder)
    # Later steps than this one are not counted: only a damaged checkpoint, or one of a longer past, can stand there.
    older = list(itertools.dropwhile(lambda path: path != newest, numbered_folders(folder)))  # it may be gone already
    for path in older[keep:]:  # renamed first: a kill in the middle leaves no half of a checkpoint under its name
        removed = folder / f".partial-removed-{path.name}"
        os.replace(path, removed)
        remove(removed)


def _remove_leftovers(folder: Path) -> None:
    """What a killed save has left. Nothing goes by another name than those given here: it is the user's."""
    for path in listed(folder):
        kind = _LEFTOVER.fullmatch(path.name)
        if kind and (kind[1] == BEST or step_of(kind[1]) is not None):
            remove(path)


def save_model(model: nn.Module, path: Path) -> None:
    """Every tensor of a model as one safetensors file, a tied one once."""
    _write_tensors(unique_tensors(model), path)


def save_weights(folder: Path, *, write_model: Callable[[Path], None], model_bytes: int, state: Mapping[str, Any]) -> Path:
    """Write folder/step-<state["step"]> with weights alone: nothing trains on from it, everything else reads it.

    write_model is handed the path of the safetensors file that it writes. Raises as write_checkpoint does.
    """

    def write(partial: Path) -> None:
        write_model(partial / MODEL)
        safetensors.torch.save_file({}, partial / OPTIMIZER)

    return _save(folder, {"caller": dict(state), "optimizer": None, "generators": None}, write, model_bytes)


def _save(folder: Path, content: Mapping[str, Any], write: Callable[[Path], None], size: int) -> Path:
    """The folder of content["caller"]["step"], whole or not at all. write: the files of tensors, of `size` bytes."""
    final = folder / step_folder(content["caller"]["step"])
    partial, replaced = folder / f".partial-{final.name}", folder / f".partial-replaced-{final.name}"
    folder.mkdir(exist_ok=True)  # a run's folder that was removed is not brought back
    _remove_leftovers(folder)
    remedy = "make room and start the same command again (older checkpoints are intact)"
    check_room(folder, size + 2**20, "a checkpoint", remedy)  # headers, JSON

    partial.mkdir()
    try:
        write(partial)
        (partial / STATE).write_text(json.dumps(content, allow_nan=False))
        manifest = {name: _describe(partial / name) for name in (MODEL, OPTIMIZER, STATE)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in (*partial.iterdir(), partial):
            flush(path)
        if final.exists():  # left over from before the run was resumed at an earlier step, or damaged
            os.replace(final, replaced)
        os.replace(partial, final)
        flush(folder)
    finally:
        remove(partial)
    remove(replaced)
    return final


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # it has no other way of saying which
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def keep_as_best(path: Path) -> None:
    """Give the files of a checkpoint the second name best/, in place of an earlier best one."""
    best, partial = path.with_name(BEST), path.with_name(f".partial-{BEST}")
    replaced = path.with_name(f".partial-replaced-{BEST}")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    for file in path.iterdir():
        try:
            os.link(file, partial / file.name)
        except OSError:  # a file system without second names
            shutil.copyfile(file, partial / file.name)
            flush(partial / file.name)
    flush(partial)
    if best.exists():
        os.replace(best, replaced)
    os.replace(partial, best)
    flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint kept as the best by validation, None if there is none. Raises UserError when it is damaged."""
    path = folder / BEST
    if not path.is_dir():
        return None
    try:
        return verified(path)
    except DamagedCheckpoint as error:
        raise UserError(f"checkpoint {path} is damaged ({error.reason}): take checkpoint=last") from None


def latest_checkpoint(folder: Path, check: Callable[[Checkpoint], object] = lambda checkpoint: None) -> Checkpoint | None:
    """The newest whole checkpoint, None if there is none at all. A damaged one is reported on stderr and passed over.

    check: raises DamagedCheckpoint for what the caller finds wrong in one that is whole. Raises UserError when all of them are
    damaged, and as `checkpoint_folders` does; nothing is deleted.
    """
    damages = []
    for path in checkpoint_folders(folder):
        try:
            checkpoint = verified(path)
            check(checkpoint)
            return checkpoint
        except DamagedCheckpoint as error:
            damages.append(f"{path.name}: {error.reason}")
            tell(f"WARNING: checkpoint {path} is damaged ({error.reason}); looking for an earlier one")
    if damages:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({damages[0]}; nothing was deleted): restore one from a backup, "
            f"or start anew with overwrite=true or another name"
        )
    return None


def verified(path: Path) -> Checkpoint:
    """The checkpoint in a folder: each file has the size and SHA-256 of the manifest, and its form.

    Raises DamagedCheckpoint where it is not whole, and UserError where that cannot be seen, which is no damage.
    """
    try:
        with readable(str(path), _UNREADABLE, but_not=(FileNotFoundError,)):
            for name in (MANIFEST, MODEL, OPTIMIZER, STATE):  # of a checkpoint from elsewhere a link may lead anywhere
                if (path / name).is_symlink() or ((path / name).exists() and not (path / name).is_file()):
                    raise DamagedCheckpoint(path, f"{name} is no file of its own")
            try:
                manifest = read_object(path / MANIFEST)
            except Unreadable:
                raise DamagedCheckpoint(path, f"{MANIFEST} is not readable") from None
            for name in (MODEL, OPTIMIZER, STATE):
                if _describe(path / name) != manifest.get(name):
                    raise DamagedCheckpoint(path, f"{name} is not what was written")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(path, f"{Path(error.filename).name} is missing") from None
    content = _read_state(path)
    shapes = {name: _headers(path / name) for name in (MODEL, OPTIMIZER)}
    return Checkpoint(path, content["caller"], content["optimizer"], content["generators"], shapes, manifest)


def load_checkpoint(checkpoint: Checkpoint, *, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Fill the model in place; with an optimizer, set its state and the generators' too.

    Works across devices: tensors go where the parameters are. Raises UserError when the checkpoint belongs to another model or
    optimizer, or holds no generators; then nothing has been changed. Raises DamagedCheckpoint too when it went away meanwhile.
    """
    path = checkpoint.path
    if optimizer is not None and checkpoint.optimizer is None:
        raise UserError(f"checkpoint {path} holds weights alone, no training to continue: start a run with init_from=...")
    if optimizer is not None and checkpoint.optimizer != optimizer.settings():
        raise UserError(
            f"checkpoint {path} was written with other optimizer settings: resume with the configuration that the run "
            f"was started with, or start anew under another name"
        )
    saved, target = checkpoint.shapes[MODEL], unique_tensors(model)
    odd = sorted(name for name in saved.keys() | target.keys() if _shape(saved, name) != _shape(target, name))
    if odd:
        raise UserError(
            f"checkpoint {path} holds another model: {odd[0]} is {_shape(saved, odd[0])} there and "
            f"{_shape(target, odd[0])} here ({len(odd)} such tensors); build the model from the run's own config.yaml"
        )
    if optimizer is not None:
        _check_optimizer_state(checkpoint, optimizer)
        _restore_generators(checkpoint)  # the first to be changed, since it can still refuse
        optimizer.load_state_dict(_read_tensors(checkpoint, OPTIMIZER))
    parts = {name: sharded_like(tensor, target[name]) for name, tensor in _read_tensors(checkpoint, MODEL).items()}
    model.load_state_dict(parts, strict=False)  # tied ones: under one name


def _read_state(path: Path) -> dict[str, Any]:
    """state.json, of the form that _save gives it and of the step that the folder is named after. Raises DamagedCheckpoint."""
    try:
        content = read_object(path / STATE)
    except (OSError, Unreadable) as error:
        raise DamagedCheckpoint(path, f"{STATE} is not readable: {error}") from None
    caller, optimizer, generators = (content.get(key, path) for key in ("caller", "optimizer", "generators"))
    step = caller.get("step") if isinstance(caller, dict) else None
    if not is_count(step) or (path.name != BEST and step != step_of(path.name)):
        raise DamagedCheckpoint(path, f"{STATE} is not readable: it has no step, or another one's")
    if optimizer is not None and not (isinstance(optimizer, list) and isinstance(generators, dict)):
        raise DamagedCheckpoint(path, f"{STATE} is not readable: it has no optimizer or no generators")
    return content


def _headers(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file, of which the header alone is read. Raises DamagedCheckpoint.

    The library compares the header with the size of the file before it reads or allocates anything.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            odd = sorted(name for name, part in parts.items() if part.get_dtype() not in _DTYPES)
            if odd:
                kind = parts[odd[0]].get_dtype()
                raise DamagedCheckpoint(path.parent, f"{path.name} holds {odd[0]} as {kind}, no {', '.join(_DTYPES)}")
            return {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedCheckpoint(path.parent, f"{path.name}: {in_a_line(error)}") from None


def _read_tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Of one of its files. A run that trains on deletes old ones and replaces the best.

    Raises DamagedCheckpoint where the file is gone, and UserError where it is another checkpoint's by now.
    """
    try:
        tensors = safetensors.torch.load_file(checkpoint.path / name)
        replaced = checkpoint.path.name == BEST and read_object(checkpoint.path / MANIFEST) != checkpoint.manifest
    except FileNotFoundError as error:
        raise DamagedCheckpoint(checkpoint.path, f"{Path(error.filename or name).name} is missing") from None
    if replaced:
        raise UserError(f"{checkpoint.path} was replaced while it was read, by a run that trains on: start the command again")
    return tensors


def _check_optimizer_state(checkpoint: Checkpoint, optimizer: Optimizer) -> None:
    """Raises UserError unless each parameter has the whole state of its optimizer, in its own shape, or all have none.

    The fused update reads a moment as if it had the parameter's size.
    """
    saved, expected = checkpoint.shapes[OPTIMIZER], optimizer.state_shapes()
    if saved and saved != expected:
        odd = sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
        raise UserError(
            f"checkpoint {checkpoint.path} holds the state of another optimizer: {odd[0]} is {_shape(saved, odd[0])} there "
            f"and {_shape(expected, odd[0])} here ({len(odd)} such tensors): use another one"
        )


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor under its first name only: safetensors refuses tied ones."""
    first_name: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        first_name.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first_name.values()}


def _shape(tensors: Mapping[str, Any], name: str) -> str:
    """Of a tensor, or of what a header says of one."""
    return str(tuple(getattr(tensors[name], "shape", tensors[name]))) if name in tensors else "absent"


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


class _Generators(TypedDict):
    python: tuple[int, list[int], float | None]
    numpy: tuple[list[int], int, int, float]
    torch: str
    cuda: list[str]


def _generator_states() -> _Generators:
    """Python's, NumPy's and torch's global generators as plain JSON."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numpy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": (version, list(words), gauss),
        "numpy": (np.asarray(keys).tolist(), position, has_gauss, cached),
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in cuda],
    }


def check_generators(checkpoint: Checkpoint) -> None:
    """Raises DamagedCheckpoint unless the random generators can be set to what a checkpoint holds; they stay as they are."""
    if checkpoint.optimizer is not None:
        before = _generator_states()
        _restore_generators(checkpoint)
        _set_generators(before)


def _restore_generators(checkpoint: Checkpoint) -> None:
    """The reverse. A GPU that was not there when the states were taken keeps its seed.

    Raises DamagedCheckpoint for what is no state; then all are as they were.
    """
    before = _generator_states()
    try:
        _set_generators(typed(_Generators, checkpoint.generators, "generators"))
    except (UserError, Unreadable) as error:
        _set_generators(before)
        raise DamagedCheckpoint(checkpoint.path, f"generators in {STATE}: {error}") from None


def _set_generators(states: _Generators) -> None:
    """Raises Unreadable for what a library does not take."""
    version, words, gauss = states["python"]
    python = (version, tuple(words), gauss)
    keys, position, has_gauss, cached = states["numpy"]
    if len(keys) != 624 or not 0 <= position <= 624:  # NumPy would read beyond its state
        raise Unreadable("no state of NumPy's generator")
    cpu, *cuda = [_decode(state) for state in (states["torch"], *states["cuda"][: torch.cuda.device_count()])]
    try:  # around nothing but their calls
        random.setstate(python)
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(cpu)
        for index, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, index)
    except Exception as error:  # whatever three libraries make of foreign states
        raise Unreadable(in_a_line(error)) from error


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    """Raises Unreadable for what is no state in base64."""
    try:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    except ValueError as error:
        raise Unreadable(in_a_line(error)) from error
