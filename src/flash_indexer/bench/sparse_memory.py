"""One layer's sparse attention at the length of a long context: what memory a forward and backward takes in all.

    k[s,h] = [W_k[h] c[s], k_rot[s]]     v[s,h] = W_v[h] c[s]     q[t,h] = [q_nope, q_rot]       expanded
    q'[t,h] = [W_k[h]^T q_nope, q_rot]   out[t,h] = W_v[h] (sum over S_t of a c[s])              absorbed

DeepSeek-V3.2's q' and its attention's output take 36 GB at 131,072 tokens, their gradients as much. So they are made
for a run of queries at a time, and made again in the backward: what lives as long as the layer are q as it is expanded,
the output, their gradients, and the indexer's side. Keys' gradients are summed in float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_indexer.ops import dsa_attention, select_keys
from flash_indexer.ops.bodies import NoKernel, need_kernels

NAME = "v32_layer_128k"
SAMPLED_ROWS, ROUNDED = 4, 2**-5  # q', out and their gradients are rounded to bfloat16 on their way
HEADS, NOPE, ROPE, RANK, VALUES, INDEX_HEADS, INDEX_WIDTH, TOPK = 128, 128, 64, 512, 128, 64, 128, 2048


@dataclass(frozen=True)
class Layer:
    """tokens: queries and keys, one document. queries: of a run."""

    tokens: int
    queries: int = 4096
    H: int = HEADS
    K: int = TOPK
    nope: int = NOPE
    rope: int = ROPE
    rank: int = RANK
    V: int = VALUES
    I: int = INDEX_HEADS
    E: int = INDEX_WIDTH

    @property
    def scale(self) -> float:
        """The model's softmax scale."""
        return float((self.nope + self.rope) ** -0.5)


class Tensors(NamedTuple):
    """Leaves q [T, H, nope + rope], latent and index_k float32 [T, rank + rope], [T, E], w_k [H, nope, rank], w_v [H,
    rank, V], index_q [T, I, E], index_weights [T, I]; and d_out [T, H, V].
    """

    q: Tensor
    latent: Tensor
    w_k: Tensor
    w_v: Tensor
    index_q: Tensor
    index_k: Tensor
    index_weights: Tensor
    d_out: Tensor


def measure(layer: Layer = Layer(131072)) -> dict[str, Any]:
    """Runs a layer once, checks sampled queries in float64, and says what memory was allocated at most."""
    deterministic = _has_order()
    step(make(Layer(2 * layer.queries, layer.queries)), Layer(2 * layer.queries, layer.queries), deterministic)
    x = make(layer)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    out, kl = step(x, layer, deterministic)
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated()
    errors = check(x, layer, out)
    if not bool(kl.isfinite().all()):
        raise RuntimeError(f"bench: {int((~kl.isfinite()).sum())} of {layer.tokens} tokens have no finite KL")
    return {
        "size": vars(layer), "peak_bytes": peak, "tensor_bytes": sum(y.nbytes for y in x), "seconds": seconds,
        "deterministic": deterministic, "errors": errors,
    }  # fmt: skip


def line(record: dict[str, Any]) -> str:
    """One line for people."""
    order = "the same bits every time" if record["deterministic"] else "additions in any order"
    return (
        f"{record['name']:<14} {record['peak_bytes'] / 1e9:.1f} GB at most, forward and backward of "
        f"{record['size']['tokens']:,} tokens, {record['seconds']:.1f} s, {order}"
    )


def make(layer: Layer, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Random tensors whose logits have a variance of one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)

    T, wide = layer.tokens, torch.float32 if dtype == torch.bfloat16 else dtype
    leaves = (
        normal(T, layer.H, layer.nope + layer.rope), normal(T, layer.rank + layer.rope, dtype=wide),
        normal(layer.H, layer.nope, layer.rank) * layer.rank**-0.5,
        normal(layer.H, layer.rank, layer.V) * layer.rank**-0.5,
        normal(T, layer.I, layer.E), normal(T, layer.E, dtype=wide),
        normal(T, layer.I, dtype=wide) * (layer.I * layer.E) ** -0.5,
    )  # fmt: skip
    return Tensors._make([*(x.requires_grad_() for x in leaves), normal(T, layer.H, layer.V)])


def step(x: Tensors, layer: Layer, deterministic: bool) -> tuple[Tensor, Tensor]:
    """out [T, H, V] and KL [T]; gradients of every leaf are in its grad."""
    key_start = torch.zeros(layer.tokens, dtype=torch.int32, device=x.q.device)
    key_end = torch.arange(1, layer.tokens + 1, dtype=torch.int32, device=x.q.device)
    weight = x.index_weights.new_full((layer.tokens,), 1 / layer.tokens).detach()
    kl = torch.empty_like(weight)

    def attend(q: Tensor, index_q: Tensor, index_weights: Tensor, rows: slice) -> Tensor:
        latent, index_k = x.latent.to(q.dtype), x.index_k.to(q.dtype)
        absorbed = torch.einsum("thn,hnr->thr", q[..., : layer.nope], x.w_k)
        made = dsa_attention(
            torch.cat([absorbed, q[..., layer.nope :]], -1), latent[:, None], None, index_q, index_k, index_weights,
            softmax_scale=layer.scale, key_start=key_start[rows], key_end=key_end[rows], topk=layer.K,
            value_dim=layer.rank, token_weight=weight[rows], kl="backward", kl_out=kl[rows],
            deterministic=deterministic,
        )  # fmt: skip
        return torch.einsum("thr,hrv->thv", made.out, x.w_v)

    runs = zip(*(torch.split(y, layer.queries) for y in (x.q, x.index_q, x.index_weights)), strict=True)
    outs = []
    for number, run in enumerate(runs):
        begin = number * layer.queries
        outs.append(checkpoint(attend, *run, slice(begin, begin + len(run[0])), use_reentrant=False))
    out = torch.cat(outs)
    del outs
    torch.autograd.backward(out, x.d_out)
    return out.detach(), kl


def check(x: Tensors, layer: Layer, out: Tensor) -> dict[str, float]:
    """Relative errors of the output and of q's gradient at sampled queries, whose keys are selected once more.

    Raises:
        RuntimeError: where one is larger than ROUNDED.
    """
    errors = {"out": 0.0, "dq": 0.0}
    for row in torch.linspace(layer.tokens // 3, layer.tokens - 1, SAMPLED_ROWS).long().tolist():
        end = torch.tensor([row + 1], dtype=torch.int32, device=out.device)
        one = slice(row, row + 1)
        found = select_keys(
            x.index_q[one].detach(), x.index_k.detach().to(out.dtype), x.index_weights[one].detach(),
            key_start=torch.zeros_like(end), key_end=end, topk=layer.K,
        )  # fmt: skip
        keys = found.indices[0, : int(found.count[0])].long()
        q = x.q[row].detach().double().requires_grad_()
        right = _attention(q, x.latent[keys].detach().to(out.dtype).double(), x, layer)
        (dq,) = torch.autograd.grad(right, q, x.d_out[row].double())
        if x.q.grad is None:
            raise RuntimeError("bench: q got no gradient")
        for name, mine, theirs in (("out", out[row], right.detach()), ("dq", x.q.grad[row], dq)):
            error = float((mine.double() - theirs).norm() / theirs.norm())
            errors[name] = max(errors[name], error) if error == error else error
    wrong = {name: error for name, error in errors.items() if not error <= ROUNDED}
    if wrong:
        raise RuntimeError(f"bench: results are wrong, so no memory is reported: relative errors {wrong}")
    return errors


def _attention(q: Tensor, latent: Tensor, x: Tensors, layer: Layer) -> Tensor:
    """Of one query [H, nope + rope] over its selected keys, in the expanded form: [H, V]."""
    rank, nope = layer.rank, layer.nope
    k = torch.einsum("sr,hnr->hsn", latent[:, :rank], x.w_k.detach().double())
    v = torch.einsum("sr,hrv->hsv", latent[:, :rank], x.w_v.detach().double())
    logits = torch.einsum("hn,hsn->hs", q[:, :nope], k) + q[:, nope:] @ latent[:, rank:].T
    return torch.einsum("hs,hsv->hv", (logits * layer.scale).softmax(-1), v)


def _has_order() -> bool:
    """Whether kernels give the keys' gradients the same bits every time."""
    layer = Layer(256, 256)
    try:
        with need_kernels():
            step(make(layer), layer, True)
    except NoKernel:
        return False
    return True
