"""attach(index_dtype=..., teacher_dtype=...): losses and gradients against the definition on rounded tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flash_indexer import reference
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach
from flash_indexer.ops.quantization import dequantize, quantize

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(0, 61, (1, 33), generator=torch.Generator().manual_seed(2))
ARITHMETICS = [("fp8", None), ("fp8_unrotated", None), (None, "fp8"), (None, "fp8_unrotated"), ("fp8", "fp8")]


def attached(tiny: Tiny, **options: Any) -> IndexerHandle:
    model = tiny("llama")
    torch.manual_seed(1)
    handle = attach(model, num_heads=3, head_dim=32, **options)
    with torch.no_grad():
        for indexer in handle.indexers.values():
            indexer.weights_proj.weight.mul_(30)  # scores far from uniform: the rounding shows
    return handle


def rounded(x: Tensor, rotation: bool = False) -> Tensor:
    return dequantize(quantize(x, rotation=rotation), torch.float64)


def wanted(c: LayerCapture, index_dtype: str | None, teacher_dtype: str | None) -> tuple[float, list[Tensor]]:
    """Mean KL, and the gradients of index_q, index_k and index_weights, in float64."""
    q, k, index_q, index_k, weights = (x.double() for x in (c.q, c.k, c.index_q, c.index_k, c.index_weights))
    if teacher_dtype is not None:
        q, k = (rounded(x, teacher_dtype == "fp8") for x in (q, k))
    leaves = index_q.requires_grad_(), index_k.requires_grad_(), weights.requires_grad_()
    bounds: dict[str, Any] = dict(softmax_scale=c.softmax_scale, key_start=c.key_start, key_end=c.key_end)
    if index_dtype is None:
        loss, _ = reference.indexer_kl(q, k, *leaves, **bounds)
    else:
        low_q, low_k = (rounded(x.detach(), index_dtype == "fp8") for x in (index_q, index_k))
        loss, _ = reference.rounded_indexer_kl(q, k, leaves, (low_q, low_k), **bounds)
    return float(loss.detach()), list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(("index_dtype", "teacher_dtype"), ARITHMETICS)
def test_the_loss_is_that_of_rounded_tensors_and_passes_straight_through(
    tiny: Tiny, index_dtype: str | None, teacher_dtype: str | None
) -> None:
    handle = attached(tiny, index_dtype=index_dtype, teacher_dtype=teacher_dtype)
    captures: dict[int, LayerCapture] = {}
    inputs: dict[str, tuple[Any, ...]] = {}
    for name, indexer in handle.indexers.items():
        indexer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args}))
    handle.observer = lambda capture: captures.update(
        {capture.layer: replace(capture, **{n: getattr(capture, n).detach() for n in ("index_q", "index_k")})}
    )
    with torch.no_grad():
        handle.model(IDS, use_cache=False)
    plain = attached(tiny)
    with torch.no_grad():
        plain.model(IDS, use_cache=False)
    for layer, loss in handle.losses().items():
        capture = replace(captures[layer], index_weights=captures[layer].index_weights.detach())
        kl, gradients = wanted(capture, index_dtype, teacher_dtype)
        assert float(loss.kl) == pytest.approx(kl, rel=1e-5)
        assert abs(kl / float(plain.losses()[layer].kl) - 1) > 1e-5, "the rounding must show"
        indexer = handle.indexers[str(layer)]
        found = {name: p.grad.clone() for name, p in indexer.named_parameters()}
        indexer.zero_grad()
        outputs = indexer(*inputs[str(layer)])
        sum((x * g.float()).sum() for x, g in zip(outputs, gradients, strict=True)).backward()
        for name, p in indexer.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(index_dtype="int8"), "attach: index_dtype must be None or one of 'fp8', 'fp8_unrotated', got 'int8'"),
        (dict(teacher_dtype="fp4"), "attach: teacher_dtype must be None or one of 'fp8', 'fp8_unrotated', got 'fp4'"),
        (
            dict(index_dtype="fp8", head_dim=24),
            'attach: index_dtype="fp8": the rotation needs a power of two',
        ),
    ],
)
def test_what_can_not_be_trained_in_fp8_is_refused(tiny: Tiny, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(tiny("llama"), **(dict(num_heads=3, head_dim=32) | options))
    attach(tiny("llama"), num_heads=3, head_dim=24, rope_dim=8, index_dtype="fp8_unrotated").remove()
