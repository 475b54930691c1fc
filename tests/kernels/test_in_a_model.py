"""attention.kernel=triton in a whole model, in Triton's interpreter: the same text as by the torch kernel."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modeling.attention.mla
from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.errors import UserError
from harness.runs.load import decode_path
from modeling.attention.contract import randomise
from modeling.attention.quantisation import cache_format
from modeling.generation import generate
from modeling.kernels.attend import attend
from modeling.kernels.latent_decode import latent_attend, latent_decode
from tests.kernels.test_latent_decode import on_a_gpu
from tests.support.variants import gpt_from

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "mla": ["attention=mla"],
    "mla_plain": ["attention=mla_plain"],
    "grouped, query rank": ["attention=mla", "attention.n_kv_heads=2", "attention.q_lora_rank=20"],
    "shared latent": ["attention=mla_shared_latent"],
    "two latents": ["attention=gla"],
}
PROMPTS = [[5, 17, 3], [60, 61, 62, 63, 64, 65, 66], [9]]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install -r requirements-kernels.txt"
)


CACHES = {"float32": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def texts() -> dict[str, dict[str, bool]]:
    """For each variant and cache, whether rows of unequal length write with triton what they write with torch.

    And whether the kernel was given 8 bits as they are stored: where no other layer reads the latents.
    """
    given: list[torch.dtype] = []

    def decode(*arguments: Any, **options: Any) -> Tensor:
        given.append(arguments[2].dtype)
        return latent_decode(*arguments, **options)

    modeling.attention.mla.latent_decode = decode
    same: dict[str, dict[str, bool]] = {}
    for name, overrides in VARIANTS.items():
        model = randomise(gpt_from(overrides)).eval()
        same[name] = {}
        for cache, dtype in CACHES.items():
            written = []
            for kernel in ("torch", "triton"):
                model.set_execution(decode="absorbed", kernel=kernel)
                given.clear()
                for prompts in (PROMPTS, [PROMPTS[1]]):  # a mask, and rows of one length
                    tokens = generate(model, prompts, max_new_tokens=4, temperature=0, stop=99, cache_dtype=dtype)
                    written.append(torch.stack(list(tokens)).tolist())
            wanted = torch.float32 if name == "shared latent" else dtype
            same[name][cache] = written[:2] == written[2:] and set(given) == {wanted}
    return same


@needs_triton
def test_the_triton_kernel_writes_what_the_torch_kernel_writes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_in_a_model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(VARIANTS, dict.fromkeys(CACHES, True))


def test_a_window_is_refused_by_the_triton_kernel_before_a_token_is_read() -> None:
    model = gpt_from(["attention=mla"]).eval()
    model.set_execution(decode="absorbed", kernel="triton")
    with pytest.raises(ValueError, match=r"reads caches without a window: take attention.kernel=torch"):
        model.new_cache(1, 8, dtype=torch.float32, device="cpu", window=4)
    model.set_execution(kernel="torch")
    cache = model.new_cache(1, 8, dtype=torch.float32, device="cpu", window=4)
    model.set_execution(kernel="triton")
    with pytest.raises(ValueError, match=r"reads caches without a window: take attention.kernel=torch"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)


def test_two_latents_are_refused_by_the_triton_kernel() -> None:
    model = gpt_from(["attention=mla", "attention.kv_latent=split"]).eval()
    sentence = "attention.kernel=triton reads one latent as key and value; with kv_latent=split use attention.kernel=torch"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        model.set_execution(decode="absorbed", kernel="triton")
    with pytest.raises(UserError, match=sentence):
        build_model(load_train_config(["attention=mla", "attention.kv_latent=split", "attention.kernel=triton"]), 99)


def test_sinks_are_refused_by_the_triton_kernel() -> None:
    model = gpt_from(["attention=mla", "attention.sink_logits=true"]).eval()
    sentence = "attention.kernel=triton has no sinks; with sink_logits=true use attention.kernel=torch"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        model.set_execution(decode="absorbed", kernel="triton")


@pytest.mark.parametrize("option", ["sink_logits=true", "kv_latent=split"])
def test_where_the_triton_kernel_lacks_something_auto_takes_torch(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, capability=9)
    kernels = []
    for more in ([], [f"attention.{option}"]):
        with torch.no_grad():
            attention = gpt_from(["attention=mla", *more], n_layers=1).attentions[0]
            kernels.append(attention.kernel_for(torch.bfloat16, torch.device("cuda")))
    assert kernels == ["triton", "torch"]


WIDE = ["attention=mla", "model.d_model=512", "model.n_heads=32", "attention.kv_lora_rank=512", "attention.qk_rope_head_dim=64"]
FEW = [*WIDE, "model.n_heads=16", "attention.qk_nope_head_dim=32", "attention.v_head_dim=32"]


@torch.inference_mode()
@pytest.mark.parametrize("heads", [WIDE, FEW], ids=["many", "few"])
def test_on_hopper_auto_says_and_takes_gluon_where_it_has_the_widths_and_the_dtype(
    heads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, torch.dtype]] = []

    def decode(*arguments: Any, kernel: str, **options: Any) -> Tensor:
        taken.append((f"absorbed ({kernel} kernel)", arguments[2].dtype))
        return latent_decode(*arguments, **options)

    model = gpt_from(heads, n_layers=1).eval()
    on_a_gpu(monkeypatch, capability=9)
    monkeypatch.setattr("modeling.kernels.decode_kernels.runs_triton", lambda device, dtype: True)
    monkeypatch.setattr("modeling.attention.mla.latent_decode", decode)

    def check(name: str, kernel: str, given: torch.dtype, precision: torch.dtype) -> None:
        kept = cache_format(name)
        taken.clear()
        model(torch.zeros(1, 1, dtype=torch.long), model.new_cache(1, 4, dtype=kept, device="cpu"))
        assert taken == [(decode_path(model, 1, cache=kept, precision=precision), given)]
        assert taken == [(f"absorbed ({kernel} kernel)", given)]

    for dtype, kernel in {torch.bfloat16: "gluon", torch.float16: "gluon", torch.float32: "triton"}.items():
        check(str(dtype).removeprefix("torch."), kernel, dtype, torch.float32)
    stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    for name, dtype in stored.items():  # read as they are stored, by queries in 32 bits
        check(name, "triton", dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("int8", "fp8", "int8_rotated", "int4"):
            check(name, "gluon", stored.get(name, torch.bfloat16), torch.bfloat16)
    model.set_execution(kernel="gluon")
    for name, dtype in stored.items():  # by name too
        check(name, "gluon", dtype, torch.float32)


@needs_triton
@torch.inference_mode()
def test_the_path_that_is_said_is_the_path_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            ran.append(name)
            return function(*arguments, **options)

        return noted

    def torch_decode(*arguments: Any, kernel: str, **options: Any) -> Tensor:
        assert kernel == "triton"  # whose stand-in this is: the interpreter needs a process of its own
        return latent_decode(*arguments, **options)

    monkeypatch.setattr("modeling.attention.mla.latent_decode", noting("absorbed (triton kernel)", torch_decode))
    monkeypatch.setattr("modeling.attention.mla.latent_attend", noting("absorbed (torch kernel)", latent_attend))
    monkeypatch.setattr("modeling.attention.output.attend", noting("expanded", attend))
    model = gpt_from(["attention=mla"], n_layers=1).eval()
    for kernel in ("torch", "triton"):
        for decode in ("auto", "absorbed"):
            for cache_dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
                model.set_execution(decode=decode, kernel=kernel)
                cache = model.new_cache(1, 64, dtype=cache_dtype, device="cpu")
                most = model.attentions[0].absorbs_up_to
                assert 1 < most < 40
                for tokens in (1, 2, most + 1):
                    ran.clear()
                    model(torch.zeros(1, tokens, dtype=torch.long), cache)
                    assert ran == [decode_path(model, tokens)]
                cache[0].take_back(3 + most)
    model.set_execution(decode="auto", kernel="triton")
    assert decode_path(model) == (
        f"absorbed (triton kernel for one new token, torch for more) up to {most} new tokens a call, expanded above"
    )


def test_a_limit_that_no_call_reaches_is_not_said() -> None:
    """A latent narrower than what it stands for is never worth expanding."""
    model = gpt_from(["attention=mla", "attention.kv_lora_rank=8"], n_layers=1).eval()
    assert model.attentions[0].absorbs_up_to > model.max_seq_len
    assert decode_path(model) == "absorbed (torch kernel)"


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@torch.inference_mode()
def test_on_a_gpu_auto_decodes_with_triton_and_a_window_with_torch(cache_dtype: torch.dtype) -> None:
    model = gpt_from(["attention=mla"], n_layers=2).eval().to("cuda")
    tokens_BT = torch.randint(50, (2, 12), device="cuda")

    def logits(kernel: str, window: int | None = None) -> Tensor:
        model.set_execution(decode="absorbed", kernel=kernel)
        cache = model.new_cache(2, 64, dtype=cache_dtype, device="cuda", window=window)
        return torch.cat([model(tokens_BT[:, t : t + 1], cache) for t in range(12)], dim=1)

    auto = logits("auto")
    assert torch.equal(auto, logits("triton")) and not torch.equal(auto, logits("torch"))
    torch.testing.assert_close(auto, logits("torch"), rtol=1e-2, atol=1e-2)
    assert torch.equal(logits("auto", window=4), logits("torch", window=4))
    model.set_execution(decode="auto", kernel="auto")
    assert decode_path(model, 1) == "absorbed (triton kernel)" and decode_path(model, 1, window=4) == "absorbed (torch kernel)"


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize(
    ("heads", "kept"), [(WIDE, "bfloat16"), (FEW, "bfloat16"), (FEW, "int8"), (WIDE, "fp8")], ids=["many", "few", "int8", "fp8"]
)
def test_on_hopper_auto_decodes_with_gluon_in_a_compiled_step_too(heads: list[str], kept: str) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the Gluon kernel is for devices of compute capability 9")
    model, cache_dtype = gpt_from(heads, n_layers=2).eval().to("cuda", torch.bfloat16), cache_format(kept)
    assert decode_path(model, 1, cache=cache_dtype, precision=torch.bfloat16) == "absorbed (gluon kernel)"
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]

    def written(kernel: str, step: str) -> list[list[int]]:
        model.set_execution(decode="absorbed", kernel=kernel)
        return torch.stack(
            list(generate(model, prompts, max_new_tokens=12, temperature=0, step=step, cache_dtype=cache_dtype))
        ).tolist()

    assert written("auto", "eager") == written("auto", "graph") == written("gluon", "eager")
    assert len(written("auto", "compile")) == 12  # one graph, or it would raise


if __name__ == "__main__":
    print(json.dumps(texts()))
