"""A mistake of our own, where somebody else's file or library is read, is a traceback and nobody else's fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.config.compose import load_train_config
from harness.config.schema import TrackingConfig
from harness.data import prepared
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError
from harness.report.verdicts_from_csv import restated
from harness.study.progress import trained_so_far
from harness.tracking import open_tracker
from modeling.kernels.attend import choose_backend
from modeling.refusal import Refusal

ROOT = Path(__file__).resolve().parents[1]


def tracked(folder: Path) -> None:
    names = {"name": "run", "group": "runs", "job_type": "train"}
    open_tracker(TrackingConfig(name="wandb"), run_dir=folder, run_config={}, tags=[], metrics_bytes=0, **names).close()


def progressed(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 256}\n')
    trained_so_far(folder)


def chosen(_: Path) -> None:
    sizes = {"n_heads": 2, "n_kv_heads": 1, "qk_width": 8, "v_width": 8}
    choose_backend("sdpa_flash", dropout=0.0, device=torch.device("cpu"), dtype=torch.float32, **sizes)


def tokenized(folder: Path) -> None:
    Tokenizer.train_bpe(["a text"], 300).save(folder)
    Tokenizer.load(folder)


PLACES: dict[str, Callable[[Path], object]] = {
    "harness.config.compose.derive": lambda _: load_train_config(["attention=mla", "model=tiny", "tokenizer=bytes"]),
    "harness.data.tokenizer._texts": tokenized,
    "harness.report.verdicts_from_csv._cell": lambda _: restated(ROOT / "docs/studies/kv_budget/report.csv", "kv_budget"),
    "harness.study.progress.is_count": progressed,
    "harness.tracking.wandb_run.kept_id": tracked,
    "modeling.kernels.attend._by_sdpa": chosen,
}


@pytest.mark.parametrize("error", [KeyError, TypeError, ValueError, RuntimeError])
@pytest.mark.parametrize("place", PLACES)
def test_a_mistake_of_ours_is_a_traceback(
    place: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("ours")

    monkeypatch.setattr(place, fail)
    with pytest.raises(Exception) as raised:
        PLACES[place](tmp_path)
    assert not isinstance(raised.value, (UserError, Refusal))


def test_a_mistake_of_ours_is_no_damaged_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "starts.npy", np.arange(3))
    assert prepared._open_array(tmp_path / "starts.npy", 3).tolist() == [0, 1, 2]
    monkeypatch.setattr(prepared, "_HEADER", "text in the place of bytes")
    with pytest.raises(TypeError):
        prepared._open_array(tmp_path / "starts.npy", 3)
