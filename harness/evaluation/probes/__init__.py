"""What perplexity hides, measured on a trained model beside it. harness.config.schema.EXTRAS names the probes.

To add one: a file here that bears its name and holds a PROBE, and the name in that list.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from harness.config.schema import EXTRAS
from harness.evaluation.probes.probe import Figures, Probe, Rows, Subject


def probe(name: str) -> Probe:
    """The probe of this name, one of harness.config.schema.EXTRAS: no other module can be named."""
    assert name in EXTRAS, f"{name} is no probe"
    found = importlib.import_module(f"{__name__}.{name}").PROBE
    assert isinstance(found, Probe)
    return found


@torch.no_grad()
def measure_extras(subject: Subject, names: Iterable[str]) -> dict[str, Figures | None]:
    """The figures of the named probes, in that order; None where one does not apply.

    Through a cache those that cannot be are left out.
    """
    chosen = {name: probe(name) for name in names}
    return {name: each.measure(subject) for name, each in chosen.items() if subject.through is None or each.through_cache}


def with_floors(figures: Any, full: Any) -> Any:
    """Figures through a cache with every at_floor that full precision has: a cache cannot lose what was not there."""
    if isinstance(figures, Mapping) and isinstance(full, Mapping):
        floor = {"at_floor": full["at_floor"]} if "at_floor" in full else {}
        return {name: with_floors(figure, full.get(name)) for name, figure in figures.items()} | floor
    if isinstance(figures, list) and isinstance(full, list):
        return [with_floors(*both) for both in zip(figures, full, strict=True)]
    return figures


def extras_rows(extras: Mapping[str, Figures | None], without: Mapping[str, Figures | None] | None = None) -> Rows:
    """The rows of every probe, or why there are none; each followed by that of the same without a cache where that is given."""
    rows: Rows = []
    for name, figures in extras.items():
        full = (without or {}).get(name)
        if figures is None:
            rows.append((name, f"not measured: {probe(name).why_not}"))
        elif full is None:
            rows += probe(name).rows(figures)
        else:
            for through, plain in zip(probe(name).rows(figures), probe(name).rows(full), strict=True):
                rows += [through, ("  without it", plain[1])]
    return rows
