"""Parameters by block and training FLOPs per token, from the modules' true shapes.

A product of (m, k) and (k, n) counts 2 m k n. The backward pass counts twice the forward. Attention is counted over the
full T x T square, without a discount for the causal half (the convention of PaLM, arXiv 2204.02311, appendix B, and of
torch's own counter, against which tests compare); over T x w where a layer has a window of w < T. Recomputation (activation
checkpointing) is not counted. A layer without attention over tokens says what it multiplies instead (`products_at`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from modeling.attention import attends
from modeling.attention.layer_cache import keys_seen
from modeling.gpt import GPT


def parameters_by_block(model: GPT) -> dict[str, int]:
    """Parameter counts: embedding, positions, attention, mlp, norms, head (0 if tied), total; the vocabulary unpadded
    is not subtracted, since the padded rows are allocated and trained. Frozen ones are stored, and so are counted."""

    def count(*modules: Any) -> int:
        found = {id(p): p.numel() for module in modules if module is not None for p in module.parameters()}
        return sum(found.values())  # what layers share is there once

    tied = model.head.weight is model.embedding.weight
    counts = {
        "embedding": count(model.embedding),
        "positions": count(model.position_embedding),
        "attention": count(*model.attentions),
        "mlp": count(*(block.mlp for block in model.blocks)),
        "norms": count(model.norm, *(m for b in model.blocks for m in (b.attention_norm, b.mlp_norm))),
        "head": 0 if tied else count(model.head),
    }
    counts["total"] = sum(counts.values())
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    return counts


def training_flops_per_token(model: GPT, seq_len: int) -> int:
    """Forward and backward FLOPs for one token of a sequence of seq_len tokens."""
    # Layer by layer, since a matrix that layers share multiplies in each of them.
    linear = [m for part in (*model.blocks, model.head) for m in part.modules() if isinstance(m, nn.Linear)]
    matrices = sum(m.weight.numel() for m in linear)
    attention = sum(_products(a, seq_len) for a in model.attentions)
    frozen = sum(m.weight.numel() for m in linear if not m.weight.requires_grad)  # no gradient of their own
    return 3 * 2 * (matrices + attention) - 2 * frozen


def _products(attention: Any, context: int) -> int:
    """Multiplications of one token of so many in which no weight takes part."""
    if not attends(attention):
        return int(attention.products_at(context))
    products = attention.n_heads * (attention.qk_width + attention.v_head_dim) * keys_seen(attention, context)
    return int(products + getattr(attention, "products_per_token", 0))
