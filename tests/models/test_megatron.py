"""The adapter on tensors of Megatron's shapes: batches, packed documents, sharded heads, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer.models.megatron import dsa_indexer_loss


@dataclass
class Packed:
    """As megatron.core.packed_seq_params.PackedSeqParams."""

    qkv_format: str | None = "thd"
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    cu_seqlens_q_padded: Tensor | None = None
    cu_seqlens_kv_padded: Tensor | None = None


def tensors(sq: int, sk: int, b: int, *, heads: int = 4, groups: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((sq, b, heads, 24), (sk, b, groups, 24), (sq, b, 3, 32), (sk, b, 32), (sq, b, 3))
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    made[4] /= 3
    return made[:2] + [x.requires_grad_() for x in made[2:]]


def megatron(query: Tensor, key: Tensor, iq: Tensor, ik: Tensor, w: Tensor, scale: float, mask: Tensor) -> Tensor:
    """The layer's own arithmetic, with whole matrices and an epsilon in each logarithm: mean over tokens of KL."""
    scores = (torch.einsum("sbhd,tbd->sbht", iq, ik).relu() * w[..., None]).sum(2).transpose(0, 1)
    key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
    attention = torch.einsum("sbnh,tbnh->bnst", query, key) * scale
    attention = attention.masked_fill(~mask, -torch.inf).softmax(-1).sum(1)
    attention = attention / attention.sum(-1, keepdim=True)
    index = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (attention * ((attention + 1e-10).log() - (index + 1e-10).log())).sum(-1).mean()


def judge(inputs: list[Tensor], expected: Tensor, **options: Any) -> None:
    loss = dsa_indexer_loss(*inputs, softmax_scale=0.3, loss_coeff=0.7, **options)
    assert loss.ndim == 0
    torch.testing.assert_close(loss, 0.7 * expected, rtol=1e-5, atol=1e-8)
    got = torch.autograd.grad(loss, inputs[2:])
    for mine, theirs in zip(got, torch.autograd.grad(0.7 * expected, inputs[2:]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sq", "sk", "b", "groups"), [(13, 13, 1, 1), (7, 7, 3, 2), (5, 11, 2, 4), (1, 1, 2, 1)])
def test_batches(sq: int, sk: int, b: int, groups: int) -> None:
    inputs = tensors(sq, sk, b, groups=groups)
    mask = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
    judge(inputs, megatron(*inputs, 0.3, mask))


def test_packed_documents() -> None:
    lengths = [4, 1, 8]
    inputs = tensors(13, 13, 1)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(13, 13, dtype=torch.bool).tril()
    bounds = torch.tensor([0, 4, 5, 13], dtype=torch.int32)
    judge(inputs, megatron(*inputs, 0.3, mask), packed_seq_params=Packed(cu_seqlens_q=bounds, cu_seqlens_kv=bounds))


def test_the_main_model_gets_no_gradient() -> None:
    inputs = tensors(5, 5, 2)
    for x in inputs[:2]:
        x.requires_grad_()
    dsa_indexer_loss(*inputs, softmax_scale=0.3, loss_coeff=1.0).backward()
    assert inputs[0].grad is None and inputs[1].grad is None and inputs[2].grad is not None


def test_low_precision_weights_are_widened() -> None:
    inputs = [x.detach().float() for x in tensors(5, 5, 2)]
    weights = inputs[4].bfloat16().requires_grad_()
    dsa_indexer_loss(*inputs[:4], weights, softmax_scale=0.3, loss_coeff=1.0).backward()
    assert weights.grad is not None and weights.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.__setitem__(0, x[0][:, 0]), r"query must be \[sq, b, np, hn\]"),
        (lambda x: x.__setitem__(1, x[1][:, :1]), r"key must be \[sk, b, ng, hn\] with b=2, got \[5, 1, 1, 24\]"),
        (lambda x: x.__setitem__(3, x[3][..., None]), r"index_key must be \[sk, b, index dim\] with b=2"),
    ],
)
def test_shapes_are_checked(change: Any, match: str) -> None:
    inputs = tensors(5, 5, 2)
    change(inputs)
    with pytest.raises(ValueError, match=match):
        dsa_indexer_loss(*inputs, softmax_scale=0.3, loss_coeff=1.0)


def test_packed_parameters_are_checked() -> None:
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    packed = Packed(cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    with pytest.raises(ValueError, match="query must have b=1 where documents are packed, got b=2"):
        dsa_indexer_loss(*tensors(5, 5, 2), softmax_scale=0.3, loss_coeff=1.0, packed_seq_params=packed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(cu_seqlens_q_padded=[0, 4, 6]),
            r"cu_seqlens_q_padded \[0, 4, 6\] beside cu_seqlens_q \[0, 3, 5\]; take the",
        ),
        (
            dict(cu_seqlens_kv_padded=[0, 4, 6]),
            r"documents without padding between them, got cu_seqlens_kv_padded \[0, 4",
        ),
        (
            dict(cu_seqlens_q=None),
            r"packed_seq_params.cu_seqlens_q must be an int32 tensor \[documents \+ 1\] .*, got None",
        ),
        (
            dict(cu_seqlens_kv=None),
            "packed_seq_params.cu_seqlens_kv must be an int32 tensor .*, got None; give cu_seqlens",
        ),
        (
            dict(cu_seqlens_q=[0, 3], cu_seqlens_kv=[0, 3]),
            "cu_seqlens_q must end with the 5 tokens of its tensor, got 3; take",
        ),
        (dict(cu_seqlens_kv=[0, 3, 6]), "cu_seqlens_kv must end with the 5 tokens of its tensor, got 6"),
    ],
)
def test_documents_that_can_not_be_told_are_refused(changes: dict[str, list[int] | None], message: str) -> None:
    bounds = {name: torch.tensor([0, 3, 5], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_kv")}
    values = {name: x if x is None else torch.tensor(x, dtype=torch.int32) for name, x in changes.items()}
    packed = Packed(**(bounds | values))
    with pytest.raises(ValueError, match=message):
        dsa_indexer_loss(*tensors(5, 5, 1), softmax_scale=0.3, loss_coeff=1.0, packed_seq_params=packed)


def test_padded_boundaries_without_padding_are_taken() -> None:
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    options = dict(softmax_scale=0.3, loss_coeff=1.0)
    want = dsa_indexer_loss(*tensors(5, 5, 1), packed_seq_params=Packed(None, bounds, bounds), **options)
    padded = Packed(None, bounds, bounds, bounds.clone(), bounds.clone())
    assert torch.equal(dsa_indexer_loss(*tensors(5, 5, 1), packed_seq_params=padded, **options), want)


@pytest.mark.parametrize(("nats", "left"), [(20, 0.954), (25, 0.122), (30, 9.3e-4), (40, 4.2e-8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_error_keeps_its_gradient(dtype: torch.dtype, nats: int, left: float) -> None:
    """One query, two keys: the teacher sees the first alone, the indexer prefers the second by so many nats."""
    query, key = torch.ones(2, 1, 1, 1), torch.tensor([50.0, -50.0]).view(2, 1, 1, 1)
    index_key = torch.tensor([0.0, float(nats)]).view(2, 1, 1)
    tensors = [query, key, torch.ones(2, 1, 1, 1), index_key, torch.ones(2, 1, 1, requires_grad=True)]
    tensors = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in tensors]
    loss = dsa_indexer_loss(*tensors, softmax_scale=1.0, loss_coeff=2.0)  # the first query sees one key, KL 0
    (ours,) = torch.autograd.grad(loss, tensors[4])
    assert loss.item() == pytest.approx(nats, rel=1e-5) and float(ours[1]) == pytest.approx(nats, rel=1e-5)
    theirs = 2 * megatron(*tensors, 1.0, torch.ones(2, 2, dtype=torch.bool).tril())
    (gradient,) = torch.autograd.grad(theirs, tensors[4])
    assert float(gradient[1]) == pytest.approx(left * nats, rel=0.02)


def test_sharded_heads(pair: Any) -> None:
    """Two ranks with half of the heads each get what one process gets."""
    inputs = tensors(7, 7, 2)
    expected = dsa_indexer_loss(*inputs, softmax_scale=0.3, loss_coeff=0.7)
    gradients = torch.autograd.grad(expected, inputs[2:])
    plain = [x.detach() for x in inputs]
    for loss, *got in pair.call("megatron", 2, which="2", tensors=plain, softmax_scale=0.3, loss_coeff=0.7):
        torch.testing.assert_close(loss, expected.detach())
        for mine, theirs in zip(got, gradients, strict=True):
            torch.testing.assert_close(mine, theirs)
