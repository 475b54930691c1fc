"""MLA's absorbed path in whole models: the same text as by expanding, and what `auto` takes."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.attention.contract import randomise, relative_error
from modeling.attention.mla import MultiheadLatentAttention
from modeling.generation import generate
from modeling.gpt import GPT
from tests.support.variants import KNOBS, SHIPPED, gpt_from

MLA = {name: [f"attention={name}"] for name in SHIPPED if name.startswith(("mla", "gla"))} | {
    name: overrides for name, (overrides, _) in KNOBS.items() if name.startswith(("mla", "gla"))
}
BLOCKED = (
    "mla, norm after up-projection",
    "mla, QK-norm",
    "mla, QK-norm, a query rank, grouped up-projection, rotation after it",
    "mla, rotation after up-projection",
    "mla, rotated after up, a window by a mask",
    "gla, two heads out of two latents, rotation after up-projection",
)


def model_of(name: str) -> GPT:
    model: GPT = randomise(gpt_from(MLA[name])).eval()
    return model


@pytest.mark.parametrize("name", sorted(MLA.keys() - set(BLOCKED)))
@torch.no_grad()
def test_both_paths_give_the_logits_of_the_full_forward_and_the_same_greedy_text(name: str) -> None:
    model = model_of(name)
    tokens = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(0))
    full, texts = model(tokens)[..., :100], []
    for path in ("expand", "absorbed"):
        model.set_execution(decode=path)
        cache = model.new_cache(2, 20, dtype=torch.float32, device="cpu")
        pieces = torch.cat([model(piece, cache)[..., :100] for piece in tokens.split([9, 7, 1, 1, 1, 1], dim=1)], dim=1)
        assert relative_error(pieces, full) <= 1e-5, path
        texts.append(torch.stack(list(generate(model, tokens.tolist(), max_new_tokens=20, temperature=0))))
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", BLOCKED)
def test_what_stands_between_query_and_latent_leaves_one_path(name: str) -> None:
    model = model_of(name)
    assert model.attentions[0].decode_paths == ("auto", "expand") and model.attentions[0].absorbs_up_to == 0
    with pytest.raises(ValueError, match=r"decode=absorbed is not a path of this variant \(a norm or a rotation stands"):
        model.set_execution(decode="absorbed")


def paths_taken(model: GPT, tokens: int, *, cached: bool = True) -> set[str]:
    """Which of the two is called for that many new tokens."""
    taken: set[str] = set()
    names = ("_attend_absorbed", "_attend_expanded")
    originals = {name: getattr(MultiheadLatentAttention, name) for name in names}

    def noting(name: str) -> object:
        def call(self: MultiheadLatentAttention, *args: object, **kwargs: object) -> object:
            taken.add(name.removeprefix("_attend_"))
            return originals[name](self, *args, **kwargs)

        return call

    with patch.multiple(MultiheadLatentAttention, **{name: noting(name) for name in names}), torch.no_grad():
        cache = model.new_cache(1, tokens, dtype=torch.float32, device="cpu") if cached else None
        model(torch.zeros(1, tokens, dtype=torch.long), cache)
    return taken


def test_auto_absorbs_short_calls_through_a_cache_and_expands_everything_else() -> None:
    model = model_of("mla")
    limit = model.attentions[0].absorbs_up_to
    assert limit == 4 * 24 * 24 // (3 * (2 * 24 - 24))  # 4/3 L (N + V) / (2 L - N - V) with a key/value head a head
    assert paths_taken(model, 1) == paths_taken(model, limit) == {"absorbed"}
    assert paths_taken(model, limit + 1) == {"expanded"}
    assert paths_taken(model, 1, cached=False) == {"expanded"}


def test_a_path_that_is_named_is_taken_whatever_the_length() -> None:
    model = model_of("mla")
    for path, taken in (("expand", "expanded"), ("absorbed", "absorbed")):
        model.set_execution(decode=path)
        assert paths_taken(model, 1) == paths_taken(model, 60) == {taken}


def test_deepseeks_shape_absorbs_up_to_227_queries_and_a_narrow_latent_always() -> None:
    with torch.device("meta"):
        deepseek = gpt_from(["attention=mla", "model.n_heads=16", "model.head_dim=128", "model.d_model=1024"], n_layers=1)
    assert deepseek.attentions[0].kv_lora_rank == 512
    assert deepseek.attentions[0].absorbs_up_to == 4 * 512 * 256 // (3 * (1024 - 256)) == 227
    narrow = model_of("mla, rank 10").attentions[0]  # 2 L = 20 is less than N + V = 24
    assert narrow.absorbs_up_to > 10**9


def test_absorbing_multiplies_no_cached_token_by_an_up_projection() -> None:
    """The point of it: FLOPs of a step grow with the context by H (2 L + P), not by L H (N + V)."""
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of("mla")
    flops: dict[tuple[str, int], int] = {}
    for path in ("expand", "absorbed"):
        model.set_execution(decode=path, backend="reference")
        for context in (20, 40):
            cache = model.new_cache(1, context + 1, dtype=torch.float32, device="cpu")
            with torch.no_grad():
                model(torch.zeros(1, context, dtype=torch.long), cache)
                with FlopCounterMode(display=False) as counter:
                    model(torch.zeros(1, 1, dtype=torch.long), cache)
            flops[path, context] = counter.get_total_flops()
    H, L, N, V, P, layers = 4, 24, 12, 12, 6, 2
    assert flops["absorbed", 40] - flops["absorbed", 20] == 20 * layers * 2 * H * (2 * L + P)
    assert flops["expand", 40] - flops["expand", 20] == 20 * layers * 2 * (L * H * (N + V) + H * (N + P + V))


def test_no_path_but_auto_exists_where_keys_are_cached_as_they_are_used() -> None:
    with pytest.raises(ValueError, match=r"decode=absorbed is not a path of this variant \(it caches keys and values"):
        gpt_from(["attention=mha"]).set_execution(decode="absorbed")
    with pytest.raises(ValueError, match=r"kernel=gluon computes the absorbed path, which is not taken here"):
        gpt_from(["attention=mha"]).set_execution(kernel="gluon")
    with pytest.raises(ValueError, match=r"decode=fast is not a path of this variant; choose auto or expand or absorbed"):
        gpt_from(["attention=mla"]).set_execution(decode="fast")


def test_a_decoding_step_of_tensor_products_copies_no_cache() -> None:
    """Neither keys nor values, nor a copy of their factors."""
    model = gpt_from(["attention=tpa", "attention.head_dim=64"])  # 64 numbers a factor, of 4 heads
    (cache, *_) = caches = model.new_cache(2, 50, dtype=torch.bfloat16, device="cpu")
    for each in caches:
        each.make_static()
    held = {tensor.untyped_storage().data_ptr() for each in caches for tensor in each.tensors()}

    class Watch(TorchDispatchMode):
        largest_new = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
                self.largest_new = max(self.largest_new, out.numel())
            return out

    model.bfloat16()
    tokens = torch.zeros(2, 1, dtype=torch.long)
    with torch.inference_mode(), Watch() as watch:
        model.attentions[0](model.embedding(tokens), cache)
    assert watch.largest_new == cache.buffers["v_a"].numel()  # a number for each head and factor
