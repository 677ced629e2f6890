"""Output and loss in portions: the numbers of one piece, and logits that never exist whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain_api.config import RunConfig
from pretrain_trainer.loss import IGNORED, cross_entropy_sum
from pretrain_trainer.parallel import head
from pretrain_trainer.parallel.head import fuse_loss, portion

MakeConfig = Callable[..., RunConfig]
POSITIONS, DIM, VOCABULARY = 24, 16, 50


@pytest.fixture
def output(run_config: MakeConfig) -> nn.Linear:
    layer = nn.Linear(DIM, VOCABULARY, bias=False)
    fuse_loss(layer, run_config(), None)
    return layer


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, POSITIONS // 2, DIM, generator=draw, requires_grad=True)
    labels = torch.randint(VOCABULARY, (2, POSITIONS // 2), generator=draw)
    labels[0, :5] = IGNORED
    return x, labels


@pytest.mark.parametrize("positions", [1, 5, 24, 1000])
def test_portions_add_up_to_the_whole(
    output: nn.Linear,
    batch: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    positions: int,
) -> None:
    x, labels = batch
    monkeypatch.setattr(head, "PORTION_BYTES", positions * VOCABULARY * 4)
    (output(x, labels) / 7).backward()
    found = (x.grad, output.weight.grad)
    weight = output.weight.detach().requires_grad_()
    again = x.detach().requires_grad_()
    (cross_entropy_sum(functional.linear(again, weight), labels) / 7).backward()
    for ours, theirs in zip(found, (again.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_logits_never_exist_whole(
    output: nn.Linear, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "PORTION_BYTES", 6 * VOCABULARY * 4)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            logits = isinstance(result, Tensor) and result.shape[-1:] == (VOCABULARY,)
            if logits and result.shape != (DIM, VOCABULARY):  # nor the weight, transposed
                largest = max(largest, result.numel() // VOCABULARY)
            return result

    x, labels = batch
    with Watch():
        output(x, labels).backward()
    assert largest == 6


def test_without_gradients_only_the_loss_is_computed(
    output: nn.Linear, batch: tuple[Tensor, Tensor]
) -> None:
    x, labels = batch
    with torch.no_grad():
        loss = output(x, labels)
        assert loss.item() == pytest.approx(cross_entropy_sum(output(x), labels).item())


def test_a_portion_fills_its_bytes_evenly() -> None:
    assert portion(8192, 128_256) == 2048  # of Llama 3's logits, 1 GB each
    assert portion(10, 10) == 10
    assert portion(3, 10**12) == 1
