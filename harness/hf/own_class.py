"""A transformers class around our GPT, for what no stock class computes: nothing is translated, the same code runs.

A folder of it holds config.json (the run's model and attention options), weights and tokenizer, and no code: it loads
where this project can be imported, after `harness.hf.classes.register()`. A config.json is checked as a run's own
configuration is; it names a mechanism, never code.

Imported by harness/hf/classes.py alone, when one of its functions is called. Letters: B batch, T new tokens, S all
tokens so far, C vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from harness.config.build import build_model
from harness.config.checks import typed_attention
from harness.config.schema import ModelConfig, TrainConfig
from harness.config.typed import typed
from harness.errors import UserError, as_user_error
from harness.hf.config_json import OWN_TYPE, own_model, refuse_absent
from modeling.attention import attends
from modeling.attention.cache import Cache
from modeling.attention.quantisation import CacheFormat
from modeling.attention.rope import RotaryEmbedding
from modeling.generation import decode_step
from modeling.gpt import GPT
from modeling.shapes import shapes_only

logger = logging.get_logger(__name__)

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


def _of_model(field: str) -> Any:
    """A field of `model`, as a property; None where there is no model."""
    return property(lambda config: None if config.model is None else config.model[field])


class AttentionAblationConfig(PreTrainedConfig):
    """config.json: `model` and `attention` as in a run's config.yaml, and `vocab_size`.

    Raises UserError, naming the field, for what a run's configuration may not say either.
    """

    model_type = OWN_TYPE
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    # Absent only where transformers asks what the defaults are.
    model: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    vocab_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.model is not None:
            self.model = dataclasses.asdict(own_model(self.model))
        if self.attention is not None:
            self.attention = typed_attention(self.attention)
        if self.vocab_size is not None and typed(int, self.vocab_size, "vocab_size") < 1:
            raise UserError(f"vocab_size={self.vocab_size} is too small; choose 1 or more")
        super().__post_init__(**kwargs)

    # What transformers and what is built on it ask of a configuration, in their words.
    hidden_size = _of_model("d_model")
    num_hidden_layers = _of_model("n_layers")
    num_attention_heads = _of_model("n_heads")
    max_position_embeddings = _of_model("max_seq_len")
    tie_word_embeddings = _of_model("tie_embeddings")
    initializer_range = _of_model("init_std")


def _build(config: AttentionAblationConfig) -> GPT:
    fields = {field: getattr(config, field) for field in ("model", "attention", "vocab_size")}
    refuse_absent(fields)
    shape = SimpleNamespace(model=own_model(fields["model"]), attention=fields["attention"])  # all that is read of a run's
    return build_model(cast(TrainConfig, shape), fields["vocab_size"])


class GenerationCache:
    """What `generate` hands from step to step: a cache of ours per layer, allocated at the first tokens.

    max_seq_len: tokens a row that fit. kept: in what format; None: in the weights' dtype. `layers` is empty until then.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, max_seq_len: int, kept: CacheFormat | None = None) -> None:
        self.max_seq_len, self._kept = max_seq_len, kept
        self.layers: list[Cache] = []
        self._seen = 0
        self._decode: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns taken in so far, pads included: what the attention mask is wide."""
        return self._seen

    def before(self, model: GPT, batch_size: int) -> list[Cache]:
        """The layers' caches for a call with so many rows."""
        if not self.layers:
            weight = model.embedding.weight
            dtype = self._kept or weight.dtype
            with as_user_error():
                self.layers = model.new_cache(batch_size, self.max_seq_len, dtype=dtype, device=weight.device)
        if self.layers[0].batch_size != batch_size:
            raise UserError(f"past_key_values hold {self.layers[0].batch_size} rows and input_ids {batch_size}")
        return self.layers

    def after(self, new_tokens: int) -> None:
        self._seen += new_tokens

    def decode(self, model: GPT, forward: Callable[..., Tensor], token_B: Tensor) -> Tensor:
        """logits_BC of one more token a row; on CUDA replayed from a graph, where what `forward` does can be captured."""
        if self._decode is None:
            try:
                self._decode = decode_step(model, self.layers, "auto", token_B, None, forward=forward)
            except RuntimeError as error:  # an adapter or a hook that asks the device for a number
                reason = str(error).strip().splitlines()[0]
                logger.warning(f"decoding is not captured in a CUDA graph, it runs eagerly: {reason}")
                self._decode = decode_step(model, self.layers, "eager", token_B, None, forward=forward)
        return self._decode(token_B, None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was: beam search drops rows and doubles others."""
        for layer in self.layers:
            for tensor in (*layer.tensors(), layer.lengths_B):
                tensor.copy_(tensor[beam_idx.to(tensor.device)])


class AttentionAblationForCausalLM(PreTrainedModel, GenerationMixin):
    """`model` is a GPT of modeling/; logits are cut to the vocabulary, without the rows that only pad it.

    `generate` writes greedily, by sampling or with beams, through the variant's own cache: an MLA keeps its latents. On CUDA
    its steps are replayed from a graph, as those of modeling/generation.py are.
    """

    config_class = AttentionAblationConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _input_embed_layer = "embedding"
    _supports_sdpa = True
    accepts_loss_kwargs = True  # the Trainer's num_items_in_batch

    def __init__(self, config: AttentionAblationConfig) -> None:
        super().__init__(config)
        self.model = _build(config)
        # Besides the head, layers of a group may have projections in common.
        first: dict[int, str] = {}
        self._tied_weights_keys = {
            name: first[id(parameter)]
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if first.setdefault(id(parameter), name) != name
        }
        self._no_split_modules = ["GPT"]  # whose caches lie on one device
        self.post_init()

    def init_weights(self) -> None:
        """GPT's constructor has set them; here they are only tied."""
        self.tie_weights(recompute_mapping=False)

    def initialize_weights(self) -> None:
        """After loading: what a file lacked gets values, and what no file holds is made anew."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, RotaryEmbedding):
                module.to(self.dtype)  # which rebuilds its tables
            for name in getattr(module, "frozen", ()):
                module.get_parameter(name).requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = cast(nn.Linear, new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        if new_num_tokens in (None, self.model.vocab_size) and pad_to_multiple_of is None:
            return self.model.embedding
        raise UserError("the vocabulary of this class stays as it was trained: train a run with the other tokenizer")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        tokenizer: object = None,  # which `generate` hands on when it is given stop_strings
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T) -> logits_BTC in float32, the loss where there are labels (-100: not scored), shifted here.

        attention_mask (B, S): 0 at pads, on either side; S counts what past_key_values hold. position_ids (B, T) or
        (1, T): positions other than the tokens' own places among the real ones. inputs_embeds (B, T, D) stand in for
        input_ids. cache_position (T,): where the new tokens go, which is behind what past_key_values hold. Without
        use_cache=True or past_key_values nothing is cached. output_hidden_states: x_BTD before each layer and behind the
        last norm. output_attentions: weights_BHTS of each layer, as the reference backend computes them. Raises UserError
        for more tokens than the model has positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds, and not both")
        x_BTD = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        B, T = x_BTD.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = GenerationCache(self.model.max_seq_len)
        past = self._tokens_before(past_key_values, cache_position, T)
        valid_BT = _valid(attention_mask, B, past, T)
        positions_BT = _positions(position_ids, attention_mask, B, past, T)
        layers = None if past_key_values is None else past_key_values.before(self.model, B)
        wanted = _Wanted(self, output_hidden_states, output_attentions, layers)
        plain = input_ids is not None and labels is None and not (wanted.hidden_states or wanted.attentions)
        decodes = past_key_values is not None and past > 0 and T == 1 and valid_BT is None and positions_BT is None
        if plain and decodes and not torch.is_grad_enabled():
            assert input_ids is not None and past_key_values is not None
            logits_BC = past_key_values.decode(self.model, self._logits, input_ids[:, 0])
            past_key_values.after(1)
            return CausalLMOutputWithPast(logits=logits_BC[:, None], past_key_values=cast(Any, past_key_values))
        with as_user_error(), wanted:
            x_BTD = self.model.hidden_of(x_BTD, layers, positions_BT, valid_BT)
        if past_key_values is not None:
            past_key_values.after(T)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTC = self._head(x_BTD[:, kept])
        about = {"vocab_size": self.model.vocab_size, "num_items_in_batch": num_items_in_batch}
        loss = None if labels is None else self.loss_function(logits=logits_BTC, labels=labels, **about)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTC,
            past_key_values=cast(Any, past_key_values),
            **wanted.shown(x_BTD, None if layers is None else attention_mask, past + T),
        )

    def _logits(self, tokens_BT: Tensor, cache: Sequence[Cache], valid_BT: Tensor | None = None) -> Tensor:
        return self._head(self.model.hidden_of(self.model.embedding(tokens_BT), cache, None, valid_BT))

    def _head(self, x_BTD: Tensor) -> Tensor:
        logits_BTC: Tensor = self.model.head(x_BTD)  # by the module, which may be an adapter
        return logits_BTC.float()[..., : self.model.vocab_size]

    def _tokens_before(self, past_key_values: object, cache_position: Tensor | None, T: int) -> int:
        """How many tokens a cache holds. Raises UserError for one that is none of ours, or where T more do not fit behind."""
        if past_key_values is not None and not isinstance(past_key_values, GenerationCache):
            raise UserError(
                f"past_key_values is a {type(past_key_values).__name__}: this class has caches of its own, which "
                f"use_cache=True returns"
            )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past + T > self.model.max_seq_len:
            raise UserError(f"{past + T} tokens are more than the model's {self.model.max_seq_len} positions")
        if cache_position is not None and cache_position.tolist() != list(range(past, past + T)):
            raise UserError(f"cache_position must be {past} to {past + T - 1}: new tokens go behind those that are cached")
        return past

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Activations inside the blocks are computed again in the backward pass, as activation_checkpointing does."""
        self.model.activation_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.activation_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.model.activation_checkpointing

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Where `generate` makes its cache: ours, for max_cache_length tokens, which is all but the last."""
        excess = max_cache_length - self.model.max_seq_len
        if excess > 0:
            raise UserError(
                f"prompt and new tokens exceed the model's {self.model.max_seq_len} positions: ask for {excess} tokens "
                f"less (max_new_tokens)"
            )
        if generation_mode not in _MODES:
            raise UserError(
                f"generation by {generation_mode.value} needs a cache that takes tokens back: write greedily, by "
                f"sampling or with beams"
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation={generation_config.cache_implementation} is none of this class, which has caches "
                f"of its own: leave it out"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = GenerationCache(max_cache_length)


def _valid(attention_mask: Tensor | None, B: int, past: int, T: int) -> Tensor | None:
    """True at the real ones of the new tokens; None where all are."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (B, past + T):
        raise UserError(
            f"attention_mask has the shape {tuple(attention_mask.shape)} and must have {(B, past + T)}: a row for each of "
            f"input_ids, a column for each token so far"
        )
    valid_BT = attention_mask[:, past:].bool()
    return None if bool(valid_BT.all()) else valid_BT


def _positions(position_ids: Tensor | None, attention_mask: Tensor | None, B: int, past: int, T: int) -> Tensor | None:
    """Positions of the new tokens; None where each has its own place among the real ones, which the model knows."""
    if position_ids is None:
        return None
    if position_ids.shape not in ((B, T), (1, T)):
        raise UserError(f"position_ids has the shape {tuple(position_ids.shape)} and must have {(B, T)} or {(1, T)}")
    positions_BT = position_ids.expand(B, T)
    if attention_mask is None:
        usual_BT = torch.arange(past, past + T, device=position_ids.device).expand(B, T)
        return None if torch.equal(usual_BT, positions_BT) else positions_BT
    mask_BS = attention_mask.to(position_ids.device).long()
    differs_BT = (mask_BS.cumsum(dim=1)[:, past:] - 1 != positions_BT) & mask_BS[:, past:].bool()
    return positions_BT if bool(differs_BT.any()) else None


class _Wanted:
    """What a forward pass shows beside its result, while this is entered: what is asked for, else what the configuration says.

    Raises UserError for attentions that cannot be shown, through `cache` or of layers that have none.
    """

    def __init__(
        self,
        own: AttentionAblationForCausalLM,
        hidden_states: bool | None,
        attentions: bool | None,
        cache: Sequence[Cache] | None,
    ) -> None:
        self._model = own.model
        self.hidden_states = own.config.output_hidden_states if hidden_states is None else hidden_states
        self.attentions = own.config.output_attentions if attentions is None else attentions
        if self.attentions and any(layer.window is not None for layer in cache or ()):
            raise UserError(
                "output_attentions=True through a cache with a window, which holds no key for each token: take use_cache=False"
            )
        if self.attentions and not all(map(attends, self._model.attentions)):
            raise UserError("output_attentions=True of a model with layers that keep a state and weigh no tokens: leave it out")
        self._inputs: list[Tensor] = []  # x_BTD of each block
        self._weights: list[Tensor] = []
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self.hidden_states:
            for block in self._model.blocks:
                hook = block.register_forward_pre_hook(lambda _, inputs: self._inputs.append(inputs[0]))
                self._hooks.callback(hook.remove)
        if self.attentions:
            for attention in self._model.attentions:
                self._hooks.callback(setattr, attention, "backend", attention.backend)
                hook = attention.register_forward_pre_hook(
                    lambda _, inputs, options: (inputs, options | {"weights_out": self._weights}), with_kwargs=True
                )
                self._hooks.callback(hook.remove)
            self._model.set_execution(backend="reference")

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def shown(self, x_BTD: Tensor, attention_mask: Tensor | None, S: int) -> dict[str, Any]:
        """Fields of the output; None for what is not asked for. x_BTD: behind the last norm. The others: as `_columns`."""
        return {
            "hidden_states": (*self._inputs, x_BTD) if self.hidden_states else None,
            "attentions": self._columns(attention_mask, S) if self.attentions else None,
        }

    def _columns(self, attention_mask: Tensor | None, S: int) -> tuple[Tensor, ...]:
        """weights_BHTS with a column for each of the S tokens so far, pads included, where a cache held the real ones."""
        if attention_mask is None:
            return tuple(self._weights)
        placed = []
        for weights_BHTS in self._weights:
            full_BHTS = weights_BHTS.new_zeros(*weights_BHTS.shape[:3], S)
            for row, weights_HTS in enumerate(weights_BHTS):
                real = attention_mask[row].to(full_BHTS.device).bool().nonzero()[:, 0]
                full_BHTS[row][..., real] = weights_HTS[..., : len(real)]
            placed.append(full_BHTS)
        return tuple(placed)


def as_own_class(model: GPT, shape: ModelConfig, attention: dict[str, Any]) -> AttentionAblationForCausalLM:
    """A model of this class around `model`, whose options are given: the same tensors, nothing is copied."""
    sizes = dataclasses.asdict(shape) | {"vocab_size": None}  # which stands once, beside it
    config = AttentionAblationConfig(model=sizes, attention=attention, vocab_size=model.vocab_size)
    with shapes_only():  # replaced at once
        own = AttentionAblationForCausalLM(config)
    own.model = model
    return own.eval()
