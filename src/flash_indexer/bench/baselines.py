"""The attention that a benchmark runs beside ours, forward and backward: FlashAttention-2, cuDNN's, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention


class Attention(Protocol):
    """The sizes of an attention over causal documents of equal lengths."""

    @property
    def H(self) -> int: ...
    @property
    def G(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def V(self) -> int: ...
    @property
    def documents(self) -> tuple[int, ...]: ...


def attention_contestants(size: Attention) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Contestants fa2_forward, fa2_backward, cudnn_forward, cudnn_backward, and why those that are absent are."""
    contestants: dict[str, Callable[[], Any]] = {}
    reasons: dict[str, str] = {}
    for name, make in (("fa2", flash_attention_2), ("cudnn", cudnn)):
        try:
            forward, backward = make(size)
            forward()
            backward()
            torch.cuda.synchronize()
        except (RuntimeError, ValueError) as error:
            reasons[name] = str(error).strip().split("\n")[0][:200]
        else:
            contestants |= {f"{name}_forward": forward, f"{name}_backward": backward}
    return contestants, reasons


def flash_attention_2(size: Attention) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The variable-length form, all documents in one call; values as wide as keys."""
    if size.D > 256:
        raise ValueError(f"FlashAttention-2 takes head widths up to 256, got {size.D}")
    T, longest = sum(size.documents), max(size.documents)
    q, k, v, d_out = _normal(T, size.H, size.D), *(_normal(T, size.G, size.D) for _ in "kv"), _normal(T, size.H, size.D)
    bounds = torch.tensor([0, *size.documents], device="cuda").cumsum(0).int()
    fixed = (bounds, bounds, longest, longest, 0.0, True)

    def forward() -> Any:
        return torch.ops.aten._flash_attention_forward(q, k, v, *fixed, False, scale=size.D**-0.5)

    out, lse, seed, offset, _ = forward()

    def backward() -> Any:
        return torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, *fixed, seed, offset, scale=size.D**-0.5
        )

    return forward, backward


def cudnn(size: Attention) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """scaled_dot_product_attention with the cuDNN backend, documents as the batch."""
    if size.D > 256:
        raise ValueError(f"cuDNN's attention takes head widths up to 256, got {size.D}")
    B, S = len(size.documents), size.documents[0]
    q = _normal(B, size.H, S, size.D).requires_grad_()
    k, v = _normal(B, size.G, S, size.D).requires_grad_(), _normal(B, size.G, S, size.V).requires_grad_()
    d_out = _normal(B, size.H, S, size.V)

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=size.G != size.H)

    out = forward()

    def backward() -> Any:
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    return forward, backward


def flex_attention_with_bits(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, d_out: Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """FlexAttention, compiled, of a causal square where a bit for each (query, key) says what is selected.

    Args:
        q: [T, H, D]. k, v: [T, G, D]. indices: [T, K], negative behind the last. d_out: [T, H, D].
    """
    T = q.shape[0]
    selected = torch.zeros(T, T + 1, dtype=torch.bool, device=q.device)
    selected.scatter_(1, torch.where(indices < 0, T, indices).long(), True)
    weights = torch.ones(32, dtype=torch.int32, device=q.device) << torch.arange(32, device=q.device)
    bits = (selected[:, :T].view(T, T // 32, 32).int() * weights.int()).sum(-1, dtype=torch.int32)

    def is_selected(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row >= column) & (((bits[row, column >> 5] >> (column & 31)) & 1) == 1)

    blocks = torch.tril(torch.ones(T // 128, T // 128, dtype=torch.int32, device=q.device))
    order = torch.arange(T // 128, dtype=torch.int32, device=q.device).expand(T // 128, -1).contiguous()
    mask = BlockMask.from_kv_blocks(  # every visible block is partial: the bit decides
        blocks.sum(-1, dtype=torch.int32)[None, None], order[None, None], BLOCK_SIZE=128, mask_mod=is_selected
    )
    leaves = tuple(x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in (q, k, v))
    queries, keys, values = leaves
    upstream = d_out.transpose(0, 1)[None].contiguous()
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        out: Tensor = compiled(queries, keys, values, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out

    out = forward()

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    return forward, backward


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
