"""Prepare datasets for training: `python scripts/prepare_data.py [DATASET ...] [key=value ...]`.

With no dataset named it prepares wikitext2. When the hub is out of reach it prepares stdlib instead, and
configs/local/default.yaml selects that until wikitext2 has arrived. `verify=true` reads what is already prepared to its
end, compares it with its hashes and prepares it again if it is damaged. Any other key=value is one of train_model.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

from harness.config.compose import compose, refuse_dashes
from harness.config.schema import DatasetConfig, TokenizerConfig
from harness.config.typed import typed
from harness.data import HubUnreachable, prepare
from harness.entry.cli import run_script
from harness.files.atomic import write_text

DEFAULT, FALLBACK = "wikitext2", "stdlib"
LOCAL_CONFIG = ROOT / "configs" / "local" / "default.yaml"
SIGNATURE = "# Written by prepare_for_use.sh"


VERIFY = "verify=true"


def prepare_dataset(overrides: Sequence[str]) -> None:
    """The dataset that train_model.py would use with these overrides. Raises UserError, HubUnreachable among them."""
    verify, overrides = VERIFY in overrides, [override for override in overrides if override != VERIFY]
    container = compose("train", overrides)  # the whole typed configuration would cost the import of torch
    dataset = typed(DatasetConfig, container["dataset"], "dataset")
    tokenizer = typed(TokenizerConfig, container["tokenizer"], "tokenizer")
    print(f"== Preparing {dataset.name}", flush=True)
    prepared = prepare(dataset, tokenizer, Path(container["data_dir"]), verify=verify)
    sizes = ", ".join(f"{split} {tokens.n_tokens:,}" for split, tokens in prepared.splits.items())
    print(f"== {dataset.name} is ready: tokens {sizes}; {prepared.folder}", flush=True)
    if dataset.name == DEFAULT and is_ours(LOCAL_CONFIG):
        LOCAL_CONFIG.unlink()
        print(f"== {DEFAULT} is the default dataset again ({LOCAL_CONFIG} is removed)", flush=True)


def prepare_default(overrides: Sequence[str]) -> None:
    """DEFAULT, or FALLBACK when the hub is out of reach: the latter is then selected by LOCAL_CONFIG."""
    try:
        prepare_dataset([f"dataset={DEFAULT}", *overrides])
    except HubUnreachable as error:
        print(f"\n!! {error}\n!! {FALLBACK} is prepared instead of {DEFAULT}.\n", file=sys.stderr, flush=True)
        prepare_dataset([f"dataset={FALLBACK}", *overrides])
        select_fallback(LOCAL_CONFIG)


def is_ours(path: Path) -> bool:
    """True for a file that select_fallback wrote, false for one of the user's own or none."""
    return path.is_file() and SIGNATURE in path.read_text(encoding="utf-8")


def select_fallback(path: Path) -> None:
    """Make FALLBACK the default dataset. A file of the user's own is left as it is, and that is said."""
    if path.exists() and not is_ours(path):
        print(f"!! {path} is your own and stays: select {FALLBACK} by dataset={FALLBACK}.", file=sys.stderr, flush=True)
        return
    text = f"""\
# @package _global_
{SIGNATURE} because the hub was out of reach when {DEFAULT} was to be downloaded.
# It goes away when `sh prepare_for_use.sh` has reached the hub. Until then runs use this dataset:
defaults:
  - override /dataset: {FALLBACK}
"""
    write_text(path, text)
    print(f"!! Until wikitext2 can be downloaded, runs use {FALLBACK}: {path} says so.", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    refuse_dashes(arguments)
    names = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    for name in names:
        prepare_dataset([f"dataset={name}", *overrides])
    if not names and any(override.startswith("dataset=") for override in overrides):
        prepare_dataset(overrides)
    elif not names:
        prepare_default(overrides)
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__, groups=("dataset", "tokenizer"))
