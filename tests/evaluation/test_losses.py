"""What scoring from a CUDA graph promises: the nats of the eager model, of every batch, at every state of the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.errors import UserError
from harness.evaluation.losses import CapturedLosses, TokenLosses
from harness.runs.load import token_losses
from modeling.cuda_graphs import Graph
from modeling.gpt import GPT
from tests.support.graphs import Again

CPU = torch.device("cpu")
ROWS, WINDOW, VOCAB = 4, 16, 50


def small(attention: str = "mha", device: torch.device = CPU) -> GPT:
    torch.manual_seed(0)
    sizes = ["model=tiny", "model.n_layers=2", f"model.max_seq_len={WINDOW}", f"attention={attention}"]
    return build_model(load_train_config(sizes), VOCAB).to(device).eval()


def batch(seed: int, rows: int = ROWS, length: int = WINDOW, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(VOCAB, (2, rows, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return drawn[0], drawn[1]


@torch.no_grad()
def test_whole_and_short_batches_are_replayed_and_each_gets_its_own_nats() -> None:
    graphs: list[Again] = []

    def capture(launch: Callable[[], None]) -> Again:
        graphs.append(Again(launch))
        return graphs[-1]

    model = small()
    eager = TokenLosses(model, precision=torch.float32, device=CPU)
    captured = CapturedLosses(model, precision=torch.float32, device=CPU, capture=capture)
    kept = [captured(*batch(seed)) for seed in range(3)]
    assert all(torch.equal(nats_BT, eager(*batch(seed))) for seed, nats_BT in enumerate(kept))  # none overwrites another
    assert [graph.replays for graph in graphs] == [2]

    torch.testing.assert_close(captured(*batch(3, rows=1)), eager(*batch(3, rows=1)))
    assert [graph.replays for graph in graphs] == [3]
    for other in (batch(4, rows=ROWS + 1), batch(4, length=WINDOW - 1)):
        assert torch.equal(captured(*other), eager(*other))
    cached = [model.new_cache(ROWS, WINDOW, dtype=torch.bfloat16, device=CPU) for _ in range(2)]
    assert torch.equal(captured(*batch(5), cached[0]), eager(*batch(5), cached[1]))
    assert [graph.replays for graph in graphs] == [3]

    for parameter in model.parameters():  # in place, as an optimizer does
        parameter.mul_(1.5)
    assert torch.equal(captured(*batch(0)), eager(*batch(0))) and not torch.equal(captured(*batch(0)), kept[0])


@torch.no_grad()
def test_a_model_that_cannot_be_captured_is_scored_eagerly_and_that_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(launch: Callable[[], None]) -> Graph:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = small()
    captured = CapturedLosses(model, precision=torch.float32, device=CPU, capture=refuse)
    for seed in range(3):
        assert torch.equal(captured(*batch(seed)), model.token_losses(*batch(seed)))
    said = "evaluation is not captured, it runs eagerly: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == said


def test_what_is_captured_is_chosen_by_device_and_processes() -> None:
    def chosen(capture: str, device: str = "cpu", processes: int = 1) -> type:
        options = {"capture": capture, "precision": torch.float32, "processes": processes}
        return type(token_losses(small(), device=torch.device(device), **options))

    assert chosen("auto") is chosen("off") is chosen("off", "cuda") is chosen("auto", "cuda", processes=2) is TokenLosses
    with pytest.raises(UserError, match=r"capture=on replays CUDA graphs, and this device is cpu; leave capture=auto"):
        chosen("on")


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["mha", "gqa", "mla", "mla_shared_latent"])
@torch.no_grad()
def test_replayed_and_eager_nats_are_the_same_bit_for_bit_on_a_gpu(attention: str) -> None:
    device = torch.device("cuda")
    model = small(attention, device)
    options = {"precision": torch.bfloat16, "device": device}
    eager, captured = TokenLosses(model, **options), token_losses(model, capture="on", **options)
    assert isinstance(captured, CapturedLosses)
    for round_ in range(2):
        for seed in range(3):
            tokens = batch(seed, device=device)
            assert torch.equal(captured(*tokens), eager(*tokens))
        short = batch(9, rows=1, device=device)
        torch.testing.assert_close(captured(*short), eager(*short), rtol=0.01, atol=0.01)
        assert captured._graph is not None
        for parameter in model.parameters():
            parameter.mul_(1.1 + round_)
