"""What perplexity hides, measured on a trained model beside it. harness.config.schema.EXTRAS names the probes.

To add one: a file here that bears its name and holds a PROBE, and the name in that list.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping

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
    """The figures of the named probes, in that order; None where one does not apply."""
    return {name: probe(name).measure(subject) for name in names}


def extras_rows(extras: Mapping[str, Figures | None]) -> Rows:
    """The rows of every probe, or why there are none."""
    rows: Rows = []
    for name, figures in extras.items():
        rows += [(name, f"not measured: {probe(name).why_not}")] if figures is None else probe(name).rows(figures)
    return rows
