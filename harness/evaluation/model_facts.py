"""What is known of a model before its first step: parameters by block, FLOPs, the cache as measured and by formula."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.schema import TrainConfig
from harness.errors import UserError
from harness.evaluation.cache_size import CacheSize, measure_cache
from harness.evaluation.metric import Facts
from harness.files.text import mebibytes
from modeling.attention.layer_cache import formula_bytes, formula_bytes_at
from modeling.attention.quantisation import cache_format
from modeling.flops import parameters_by_block, training_flops_per_token
from modeling.gpt import GPT


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of one variant at one model size."""

    parameters: dict[str, int]  # by block, and "total"
    flops_per_token: int  # training, forward and backward
    cache_dtype: str
    cache: CacheSize
    cache_ratio_to_mha: float  # MHA of the same heads: 2 * n_heads * head_dim elements
    mha_cache_bytes_per_token: int  # MHA of the same heads, all layers, in bfloat16
    gqa_groups: float  # GQA of the same head width with this many groups would cache as much

    def record(self) -> Facts:
        return {
            "parameters": self.parameters["total"],
            "parameters_by_block": self.parameters,
            "training_flops_per_token": self.flops_per_token,
            **self.cache.record(),
            "cache_dtype": self.cache_dtype,
            "cache_ratio_to_mha": self.cache_ratio_to_mha,
            "mha_cache_bytes_per_token": self.mha_cache_bytes_per_token,
        }

    @property
    def cache_line(self) -> str:
        """What a token takes in the cache: the figure of summary.json."""
        size, by_context = self.cache, self.cache.bytes_by_context
        line = (
            f"KV cache    {size.bytes_per_token:,} bytes per token in {self.cache_dtype}, measured and by formula "
            f"({size.elements_per_token_per_layer:g} elements per layer, {self.cache_ratio_to_mha:.3f} of MHA's, "
            f"as GQA with {self.gqa_groups:.3g} group{'' if self.gqa_groups == 1 else 's'})"
        )
        if len({size.bytes_at_context / size.context, *(b / c for c, b in by_context.items())}) == 1:
            return line
        curve = ", ".join(f"{mebibytes(b)} at {c // 1024}k" for c, b in by_context.items())
        return f"{line}\nat context  the above is at {size.context:,} tokens; MiB: {curve}"

    def lines(self) -> list[str]:
        """For the person who started the run."""
        blocks = ", ".join(f"{block} {count:,}" for block, count in self.parameters.items() if count and block != "total")
        return [
            f"parameters  {self.parameters['total']:,} ({blocks})",
            f"training    {self.flops_per_token / 1e6:,.1f} MFLOP per token",
            self.cache_line,
        ]


def model_facts(model: GPT, config: TrainConfig) -> ModelFacts:
    """Measure and count. Raises UserError when the measured cache is not what the variant's formula says."""
    dtype = cache_format(config.cache.dtype)
    size = measure_cache(model, dtype=dtype)
    at_context = {size.context: size.bytes_at_context} | size.bytes_by_context
    layers = model.attentions
    compared = [("per token", size.held_bytes_per_token, sum(formula_bytes(layer, dtype) for layer in layers))] + [
        (f"for {context:,} tokens", allocated, sum(formula_bytes_at(layer, dtype, context) for layer in layers))
        for context, allocated in at_context.items()
    ]
    for of, allocated, formula in compared:
        if allocated != formula:
            raise UserError(
                f"attention={config.attention['name']} allocates {allocated} bytes of cache {of}, its cache_formula says "
                f"{formula}: correct the class, since no number of such a run could be believed"
            )
    elements = size.elements_per_token_per_layer
    one_group = 2 * config.model.head_dim
    return ModelFacts(
        parameters=parameters_by_block(model),
        flops_per_token=training_flops_per_token(model, config.model.max_seq_len),
        cache_dtype=config.cache.dtype,
        cache=size,
        cache_ratio_to_mha=elements / (one_group * config.model.n_heads),
        mha_cache_bytes_per_token=2 * one_group * config.model.n_heads * config.model.n_layers,
        gqa_groups=elements / one_group,
    )


def cache_remark(facts: ModelFacts, config: TrainConfig) -> str | None:
    """A sentence when a latent cache is no smaller than that of the shipped GQA: the saving would be an illusion."""
    rank, groups = config.attention.get("kv_lora_rank"), max(2, config.model.n_heads // 4)
    if rank is None or "layers" in config.attention or facts.gqa_groups < groups:
        return None
    room = 2 * groups * config.model.head_dim - config.attention.get("qk_rope_head_dim", 0)
    return (
        f"note: this cache is no smaller than that of GQA with {groups} groups "
        f"({2 * groups * config.model.head_dim} elements per layer); attention.kv_lora_rank below {room} would be"
    )
