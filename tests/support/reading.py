"""Models whose layers read one another's keys and values, or latents."""

from __future__ import annotations

import torch

from modeling.attention.contract import relative_error
from modeling.gpt import GPT


@torch.no_grad()
def check_decoding(model: GPT) -> None:
    """Through a cache it says what it says without, in pieces of any length and from rows of unlike lengths."""
    tokens = torch.randint(100, (3, 20), generator=torch.Generator().manual_seed(0))
    full = model(tokens)[..., :100]
    for static in (False, True):
        cache = model.new_cache(3, 20, dtype=torch.float32, device="cpu", static=static)
        pieces = [model(piece, cache)[..., :100] for piece in tokens.split([9, 1, 7, 1, 1, 1], dim=1)]
        assert relative_error(torch.cat(pieces, dim=1), full) <= 1e-5
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 5:], valid[2, 1:] = False, False
    cache = model.new_cache(3, 12, dtype=torch.float32, device="cpu")
    model(tokens[:, :9], cache, valid_BT=valid)
    step = model(tokens[:, 9:10], cache)[:, 0, :100]
    for row, length in enumerate((9, 5, 1)):
        alone = torch.cat((tokens[row, :length], tokens[row, 9:10]))[None]
        assert relative_error(step[row], model(alone)[0, -1, :100]) <= 1e-5
