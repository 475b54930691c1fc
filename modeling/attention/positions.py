"""Whether tokens stand at positions that the model has: said as a Refusal, without waiting for a device at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.refusal import Refusal


def in_graph(device: torch.device) -> bool:
    """Whether this call is being compiled or captured: Python runs once for many steps, and nothing may wait for the device."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_positions(positions_BT: Tensor, end: int | None, max_seq_len: int) -> None:
    """Raises Refusal unless 0 <= position < max_seq_len for all.

    end: a bound that is known without looking, one above the largest; None where nobody knows one. Where it does not
    settle the matter the tensor is looked at, which waits for its device. In a step that is compiled or captured nothing is
    looked at: whoever drives such steps counts them (modeling/generation.py, decode_step).
    """
    if (end is not None and end <= max_seq_len) or in_graph(positions_BT.device):
        return
    if positions_BT.is_meta or not positions_BT.numel():
        return
    lowest, highest = (int(each) for each in positions_BT.aminmax())
    if lowest < 0:
        raise Refusal(f"position {lowest} is below 0, the first of the {max_seq_len} positions of this model")
    if highest >= max_seq_len:
        raise beyond(highest, max_seq_len)


def beyond(position: int, max_seq_len: int) -> Refusal:
    """What to raise for a position that the model does not have."""
    return Refusal(
        f"position {position} is beyond the {max_seq_len} positions of this model; use at most {max_seq_len} tokens, or "
        f"raise model.max_seq_len"
    )
