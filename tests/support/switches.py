"""What a process keeps from one run to the next: switches(), and a program that says which of them a run has moved.

python tests/support/switches.py REQUEST.json ANSWER.json: the request is {"make": [...], "evaluate": [...], "leak": bool} as
scripts/study_run.py takes it, with {name} and {seed} in its words. Two runs are made in this process; the answer names what the
first and the second have left otherwise than they found it. With "leak" the second leaves something of every kind.

The switches are not a list by hand: torch's are whatever it has a getter for.
"""

from __future__ import annotations

import atexit
import contextlib
import decimal
import faulthandler
import gc
import json
import locale
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import tqdm

GETTERS = ("get_", "is_", "are_", "_get_", "_is_", "_are_")
# Not switches: what a run draws from and seeds, what is counted, the name of the thread that asks, an object made anew.
COUNTED = ("rng_state", "stats", "thread_name", "version_map")


def switches() -> dict[str, str]:
    """By name, as text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # getters that are old
        of_torch = dict(_of_torch())
    named: dict[str, Any] = {
        **of_torch,
        **{f"environment {key}": value for key, value in os.environ.items()},
        **{f"signal {number}": signal.getsignal(number) for number in signal.valid_signals()},
        **{f"loggers.{name}": _logger(name) for name in [*logging.root.manager.loggerDict, None]},
        **{f"sys.{name}": getattr(sys, name) for name in ("path", "exit", "excepthook", "displayhook", "unraisablehook")},
        "sys.streams": (sys.stdin, sys.stdout, sys.stderr),
        "sys.limits": (sys.getrecursionlimit(), sys.getswitchinterval(), sys.gettrace(), sys.getprofile()),
        "warnings": warnings.filters,
        "numpy": (np.geterr(), np.get_printoptions()),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.callbacks),
        # tqdm has one for all of a process's bars.
        "threads": sorted(thread.name for thread in threading.enumerate() if not isinstance(thread, tqdm.TMonitor)),
        "files": len(os.listdir("/proc/self/fd")),
        "folder": os.getcwd(),
        "limits": [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")],
        "atexit": atexit._ncallbacks(),
        "others": (locale.setlocale(locale.LC_ALL), decimal.getcontext().prec, faulthandler.is_enabled(), threading.excepthook),
        "umask": _umask(),
    }
    return {name: repr(value) for name, value in named.items()}


def _of_torch() -> Iterator[tuple[str, Any]]:
    modules = [torch, torch._C, *(each for name, each in sorted(sys.modules.items()) if name.startswith("torch.backends."))]
    for module in modules:
        for name in sorted({*dir(module), *dir(type(module))}):  # settings of cuDNN, say, are properties
            if name.startswith(GETTERS) and not name.endswith(COUNTED):
                with contextlib.suppress(Exception):  # asks for an argument, or for a device that is not here
                    yield f"{module.__name__}.{name}", getattr(module, name)()
            elif module not in (torch, torch._C):
                with contextlib.suppress(Exception):
                    if isinstance(value := getattr(module, name), (bool, int, float, str, type(None))):
                        yield f"{module.__name__}.{name}", value
    for owner in ("torch.nn.modules.module", "torch.optim.optimizer"):
        held = vars(sys.modules[owner]).items()
        yield from ((f"{owner}.{name}", len(hooks)) for name, hooks in held if "_global_" in name and hasattr(hooks, "items"))
    for name in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config"):
        if name in sys.modules:
            yield from ((f"{name}.{key}", value) for key, value in sys.modules[name].shallow_copy_dict().items())


def _logger(name: str | None) -> tuple[Any, ...]:
    logger = logging.getLogger(name)
    return logger.level, logger.handlers, logger.filters, logger.disabled, logger.propagate


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def moved(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is otherwise; a logger that was not there, or settings of a module that was not imported, are made and not moved."""
    made = ("loggers.", "torch._")
    return [
        name
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not (name not in before and name.startswith(made))
    ]


LEAKS: dict[str, Callable[[], Any]] = {
    "torch.get_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "torch.are_deterministic_algorithms_enabled": lambda: torch.use_deterministic_algorithms(True),
    "torch.get_default_dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch.get_num_threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch.is_grad_enabled": lambda: torch.set_grad_enabled(False),
    "torch.is_anomaly_enabled": lambda: torch.autograd.set_detect_anomaly(True),
    "torch.backends.cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "torch.backends.cudnn.allow_tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "torch._C._get_flash_sdp_enabled": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "torch.nn.modules.module._global_forward_hooks": lambda: torch.nn.modules.module.register_module_forward_hook(print),
    "environment LEAKED": lambda: os.environ.update(LEAKED="yes"),
    f"signal {signal.SIGTERM:d}": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "loggers.None": lambda: logging.root.addHandler(logging.NullHandler()),
    "warnings": lambda: warnings.simplefilter("error"),
    "numpy": lambda: np.seterr(all="raise"),
    "files": lambda: os.dup(2),
    "threads": lambda: threading.Thread(target=threading.Event().wait, daemon=True).start(),
    "umask": lambda: os.umask(0o007),
    "gc": lambda: gc.disable(),
    "sys.excepthook": lambda: setattr(sys, "excepthook", print),
    "atexit": lambda: atexit.register(int),
}


def main(request: Path, answer: Path) -> None:
    import eval_model
    from scripts import study_run

    asked, found, evaluated = json.loads(request.read_text()), [], eval_model.main

    def leaking(overrides: list[str]) -> int:
        status = evaluated(overrides)
        for leak in LEAKS.values():
            leak()
        return status

    for number in range(2):
        words = [[word.format(name=f"made-{number}", seed=number) for word in asked[key]] for key in ("make", "evaluate")]
        if asked["leak"] and number:
            eval_model.main = leaking
        before = switches()
        status = study_run.make_run(*words)
        found.append({"status": status, "moved": moved(before, switches())})
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
