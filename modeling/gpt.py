"""A decoder-only transformer around any attention variant: Llama's block by default (pre-norm RMSNorm, SwiGLU, no biases).

Letters: B batch, T tokens, D d_model, C vocabulary padded to a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling.attention import build_attentions, hands_on, reads_back
from modeling.attention.cache import Cache, one_call
from modeling.attention.layers import HasAttentions
from modeling.attention.positions import beyond, check_positions
from modeling.kernels.cross_entropy import mask_padding
from modeling.loss import mean_nats, token_nats, token_nats_beside
from modeling.refusal import Refusal

VOCAB_MULTIPLE = 64  # a head of aligned width keeps matrix products on the fast path


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202) or squared ReLU (So et al. 2021, arXiv 2109.08668), x_BTD -> x_BTD."""

    def __init__(self, *, d_model: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        if kind not in ("swiglu", "relu2"):
            raise Refusal(f"mlp={kind} is unknown; choose swiglu or relu2")
        self.gate_proj = nn.Linear(d_model, hidden, bias=bias) if kind == "swiglu" else None
        self.up_proj = nn.Linear(d_model, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up = self.up_proj(x_BTD)
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * up if self.gate_proj is not None else F.relu(up).square())


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: nn.Module, mlp: MLP, *, d_model: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)
        self.hands_on = hands_on(attention)

    def forward(
        self,
        x_BTD: Tensor,
        cache: Cache | None,
        positions_BT: Tensor | None,
        valid_BT: Tensor | None,
        read: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x_BTD, and what its attention saw (keys and values, or latents) if other layers read it. read: what it reads."""
        shared = list(read)
        more = {"shared": shared} if self.hands_on else {}
        attended = self.attention(self.attention_norm(x_BTD), cache, positions_BT, valid_BT=valid_BT, **more)
        x_BTD = x_BTD + self.dropout(attended)
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD))), tuple(shared)


class GPT(HasAttentions):
    """Token embedding, n_layers blocks, final norm, head (tied to the embedding or its own).

    Initial values (s = init_std; every bias 0, every norm gain 1 but where its class says otherwise, as it does of what else it
    has; `outputs` are o_proj and the MLP's down_proj):

        parameters                      normal     fan_in                    xavier
        token and position embedding    N(0, s)    N(0, s)                   N(0, s)
        short convolutions              N(0, s)    N(0, s)                   N(0, s)
        head, if not tied               N(0, s)    N(0, s)                   N(0, s)
        matrices                        N(0, s)    N(0, s sqrt(D / fan_in))  U(+-sqrt(6 / (fan_in + fan_out)))
        outputs                         the same / sqrt(2 n_layers) in all three
        outputs, zero_init_outputs      0          0                         0
        frozen matrices (MLA's latent)  N(0, 1 / sqrt(fan_in)) in all three

    `fan_in` begins queries, keys and values of every mechanism with the variance that a matrix reading x of unit variance
    gives, D s^2, whatever they are made of (1 where a norm stands behind them): a class whose matrices read something else,
    or whose products are multiplied, states by what these matrices depart from the table, `fan_in_factors`. Under `normal`,
    with a norm on the latent each up-projected key or value has variance L s^2, without one D L s^4, where MHA's has D s^2;
    latent_scale multiplies either by D / L, which makes the first MHA's.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        max_seq_len: int,
        mlp: str,
        mlp_hidden: int,
        tie_embeddings: bool,
        bias: bool,
        dropout: float,
        norm_eps: float,
        causal: bool,
        init: str,
        init_std: float,
        zero_init_outputs: bool,
        activation_checkpointing: bool,
        mechanism: str,
        attention: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if init not in ("normal", "fan_in", "xavier"):
            raise Refusal(f"init={init} is unknown; choose normal, fan_in or xavier")
        self.vocab_size, self.max_seq_len, self.causal = vocab_size, max_seq_len, causal
        self.activation_checkpointing = activation_checkpointing
        self.loss_chunk_tokens: int | None = None  # how the loss is computed, not what it is: set by the trainer
        padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embedding = nn.Embedding(padded, d_model)
        self.blocks = nn.ModuleList(
            Block(
                layer,
                MLP(d_model=d_model, hidden=mlp_hidden, kind=mlp, bias=bias),
                d_model=d_model,
                norm_eps=norm_eps,
                dropout=dropout,
            )
            for layer in build_attentions(
                mechanism,
                attention,
                n_layers,
                d_model=d_model,
                n_heads=n_heads,
                max_seq_len=max_seq_len,
                causal=causal,
                bias=bias,
                norm_eps=norm_eps,
            )
        )
        learned = any(attention.positions == "learned" for attention in self.attentions)
        self.position_embedding = nn.Embedding(max_seq_len, d_model) if learned else None
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.head = nn.Linear(d_model, padded, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.initialise(init, init_std, zero_init_outputs)

    @property
    def attentions(self) -> list[Any]:
        return [block.attention for block in self.blocks]

    @torch.no_grad()
    def initialise(self, init: str, std: float, zero_outputs: bool) -> None:
        """Set every parameter as the table of this class says, from torch's global generator."""
        depth = (2 * len(self.blocks)) ** -0.5
        outputs = {id(attention.o_proj) for attention in self.attentions}
        outputs |= {id(module.down_proj) for module in self.modules() if isinstance(module, MLP)}
        D = self.embedding.embedding_dim
        factors: dict[int, float] = {}
        if init == "fan_in" and std > 0:
            for attention in self.attentions:
                stated: Mapping[str, float] = getattr(attention, "fan_in_factors", lambda variance: {})(D * std**2)
                factors |= {id(attention.get_submodule(name)): factor for name, factor in stated.items()}
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Conv1d)):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.Linear):
                if not module.weight.requires_grad:
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                elif module is self.head:
                    if module.weight is not self.embedding.weight:
                        nn.init.normal_(module.weight, std=std)
                elif id(module) in outputs and zero_outputs:
                    nn.init.zeros_(module.weight)
                elif init == "xavier":
                    nn.init.xavier_uniform_(module.weight, gain=depth if id(module) in outputs else 1.0)
                else:
                    width = (D / module.in_features) ** 0.5 * factors.get(id(module), 1.0) if init == "fan_in" else 1.0
                    nn.init.normal_(module.weight, std=std * width * (depth if id(module) in outputs else 1.0))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def hidden(
        self,
        tokens_BT: Tensor,
        cache: Sequence[Cache] | None = None,
        positions_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
    ) -> Tensor:
        """Final-norm activations x_BTD, the head's input. Arguments as in `forward`."""
        return self.hidden_of(self.embedding(tokens_BT), cache, positions_BT, valid_BT)

    def hidden_of(
        self,
        x_BTD: Tensor,
        cache: Sequence[Cache] | None = None,
        positions_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
    ) -> Tensor:
        """The same from token embeddings x_BTD."""
        with one_call(cache):
            return self.norm(self._through_blocks(x_BTD, cache, positions_BT, valid_BT))

    def _through_blocks(
        self, x_BTD: Tensor, cache: Sequence[Cache] | None, positions_BT: Tensor | None, valid_BT: Tensor | None
    ) -> Tensor:
        if self.position_embedding is not None:
            x_BTD = x_BTD + self._positions(x_BTD.shape[1], cache, positions_BT, valid_BT)
        x_BTD = self.dropout(x_BTD)
        seen: list[tuple[Tensor, ...]] = []  # by each layer that others read; nothing of the others
        for layer, block in enumerate(self.blocks):
            back = reads_back(block.attention)
            read = seen[layer - back] if back else ()
            inputs = (x_BTD, None if cache is None else cache[layer], positions_BT, valid_BT, read)
            if self.activation_checkpointing and self.training:
                x_BTD, own = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BTD, own = block(*inputs)
            seen.append(() if back else own)
        return x_BTD

    def _positions(self, T: int, cache: Sequence[Cache] | None, positions_BT: Tensor | None, valid_BT: Tensor | None) -> Tensor:
        """Rows of the learned table for these tokens, by the same rule as rotation angles."""
        assert self.position_embedding is not None
        start, end = 0, None
        if positions_BT is None and cache is not None:
            place = cache[0].place(T, valid_BT)
            start, positions_BT, end = place.start, place.positions_BT, place.end
        elif positions_BT is None and valid_BT is not None:
            positions_BT, end = (valid_BT.long().cumsum(dim=1) - 1).clamp(min=0), T
        if positions_BT is not None:
            check_positions(positions_BT, end, self.max_seq_len)
            return self.position_embedding(positions_BT)
        if start + T > self.max_seq_len:
            raise beyond(start + T - 1, self.max_seq_len)
        return self.position_embedding.weight[start : start + T]

    def forward(
        self,
        tokens_BT: Tensor,
        cache: Sequence[Cache] | None = None,
        positions_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
    ) -> Tensor:
        """Token ids -> logits_BTC in float32, -inf at the padded part of the vocabulary.

        cache: one per layer, from `new_cache`; the tokens are appended. valid_BT: True at real tokens of a batch that
        is padded on either side. positions_BT: positions other than the tokens' own places.
        """
        return self.logits(self.hidden(tokens_BT, cache, positions_BT, valid_BT))

    def logits(self, x: Tensor) -> Tensor:
        """Final-norm activations (..., D) -> logits (..., C) in float32, -inf at the padded part of the vocabulary."""
        return mask_padding(F.linear(x, self.head.weight).float(), self.vocab_size)

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy of the targets in nats, differentiable, scalar float32."""
        return self.head_loss(self.hidden(inputs_BT).flatten(0, 1), targets_BT.flatten())

    def head_loss(self, x_ND: Tensor, targets_N: Tensor) -> Tensor:
        """The loss from final-norm activations."""
        return mean_nats(x_ND, self.head.weight, targets_N, vocab_size=self.vocab_size, chunk_tokens=self.loss_chunk_tokens)

    def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor, cache: Sequence[Cache] | None = None) -> Tensor:
        """Cross-entropy of every target in nats, nats_BT float32, without gradient; logits 4096 tokens at a time.

        With an empty cache each token sees what decoding one by one would have left there: quantised entries, its own
        included, or those inside a window.
        """
        x_ND = self.hidden(inputs_BT, cache).flatten(0, 1)
        nats_N = token_nats(x_ND, self.head.weight, targets_BT.flatten(), vocab_size=self.vocab_size, chunk_tokens=4096)
        return nats_N.view_as(targets_BT)

    def token_losses_beside(self, inputs_BT: Tensor, targets_BT: Tensor, cache: Sequence[Cache]) -> Tensor:
        """What `token_losses` gives through an empty cache and without one, and what the cache changed: (3, B, T) in nats.

        The last is KL(without || through), of the distributions of every next token.
        """
        x_2ND = (self.hidden(inputs_BT, cache).flatten(0, 1), self.hidden(inputs_BT).flatten(0, 1))
        targets_N = targets_BT.flatten()
        nats_3N = token_nats_beside(x_2ND, self.head.weight, targets_N, vocab_size=self.vocab_size, chunk_tokens=4096)
        return nats_3N.unflatten(1, targets_BT.shape)
