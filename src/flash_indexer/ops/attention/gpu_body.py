"""The CUDA bodies of attention and of the per-head KL: one pass forward, two kernels for the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import MLA_WIDTHS, ONCE_WIDTHS
from flash_indexer.ops.attention.plan import Tiles, attention_items, default_weight, gradient_items, latent_items
from flash_indexer.ops.kl.gpu_body import aligned, load_kernel
from flash_indexer.ops.kl.plan import TILE

LOG2E = 1.4426950408889634
_SLOT_BYTES = 64 * 2**20  # at most this much holds partial sums of d_index_k

Sizes = Mapping[str, Mapping[str, int]]  # static sizes of each kernel named, in place of those chosen for the GPU


class Heads(NamedTuple):
    """Output [T, H, V], and float32 [T, H]: logsumexp of the attention, of the indexer, and KL (None without one)."""

    out: Tensor
    lse: Tensor
    lse_index: Tensor | None
    kl: Tensor | None


class Statistics(NamedTuple):
    """float32 [T, H]: logsumexp of the attention and of the indexer, KL, and the attention's entropy."""

    lse: Tensor
    lse_index: Tensor
    kl: Tensor
    entropy: Tensor


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError naming what the kernels support where a size is outside of it."""
    H, D, V = q.shape[1], q.shape[2], v.shape[2]
    if MLA_WIDTHS[0] == D:
        if k.shape[1] != 1 or MLA_WIDTHS[1] != V or v.data_ptr() != k.data_ptr() or v.stride() != k.stride():
            raise ValueError(
                f"{op}: v must be k[..., :512], one key head, for q of width 576 (MLA's absorbed form) on CUDA, got "
                f"k {list(k.shape)} and v {list(v.shape)}; pass that slice of k itself"
            )
    else:
        for name, letter, width in (("q", "D", D), ("v", "V", V)):
            if not 1 <= width <= 256:
                raise ValueError(
                    f"{op}: {name} must have {letter} of 1 to 256 on CUDA, or D=576 with V=512 (MLA's absorbed form), "
                    f"got {letter}={width}"
                )
    if not 1 <= H // k.shape[1] <= 128:
        raise ValueError(f"{op}: q must have 1 to 128 heads for each head of k on CUDA, got {H} for {k.shape[1]}")
    capability = torch.cuda.get_device_capability(q.device)
    if capability != (9, 0):
        raise ValueError(
            f"{op}: q must be on a GPU of compute capability 9.0 (H100, H200, GH200), got {q.device} of "
            f"{capability[0]}.{capability[1]}; move the tensors to one, or to the CPU in float32"
        )


def check_per_head(op: str, q: Tensor, k: Tensor, index_q: Tensor) -> None:
    """Raises ValueError naming what the gradient kernels support where a size is outside of it."""
    D, E, heads = q.shape[2], index_q.shape[2], q.shape[1] // k.shape[1]
    if D > 256:
        raise ValueError(
            f'{op}: q must have D of 1 to 256 for target="per_head" on CUDA, got D={D}; use the expanded form of MLA '
            "(keys per head, D=192)"
        )
    if E not in (32, 64, 128):
        raise ValueError(
            f"{op}: index_q must have E in {{32, 64, 128}} on CUDA, got E={E}; zero-pad index_q and index_k to the "
            "next of these (the products stay the same)"
        )
    if heads > 64 and (E == 128 or D > 192):
        raise ValueError(
            f'{op}: q must have at most 64 heads for each head of k for target="per_head" with E=128 or D > 192 on '
            f"CUDA, got {heads}"
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_s exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) v[s,g(h)] and lse, over the visible keys."""
    check_attention("attention", q, k, v)
    if q.shape[2] == MLA_WIDTHS[0]:
        out = _mla(q, k, v, key_start, key_end, softmax_scale)
    else:
        out = _heads(q, k, v, None, key_start, key_end, softmax_scale, sizes)
    return out.out, out.lse


def per_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    sizes: Sizes | None = None,
) -> Heads:
    """Attention, and KL[t,h] of softmax_s(w ReLU(index_q·index_k)) to it; index is index_q, index_k, index_weights."""
    return _heads(q, k, v, index, key_start, key_end, softmax_scale, sizes)


def statistics(
    q: Tensor,
    k: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    sizes: Sizes | None = None,
) -> Statistics:
    """`per_head` without values: in place of the output the entropy -sum_s p log p of each row's attention p."""
    out = _heads(q, k, None, index, key_start, key_end, softmax_scale, sizes)
    assert out.lse_index is not None and out.kl is not None
    return Statistics(out.lse, out.lse_index, out.kl, out.out)


def weight_of(token_weight: Tensor | None, key_start: Tensor, key_end: Tensor, num_keys: int) -> Tensor:
    """token_weight, or the mean over the queries that see a key."""
    return default_weight(key_start, key_end, num_keys) if token_weight is None else token_weight.contiguous()


def per_head_gradients(
    q: Tensor,
    k: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
    factor: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    needs: tuple[bool, bool, bool],
    sizes: Sizes | None = None,
    deterministic: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of index_q, index_k (in float32) and index_weights for sum_t,h factor[t] * KL[t,h].

    None where not in `needs`.

    Args:
        sums: logsumexps of the attention and of the indexer, [T, H]. factor: float32 [T].
        deterministic: False may add to index_k's by atomic additions, where that is faster and torch does not ask for
            deterministic algorithms.
    """
    index_q, index_k, weights = index
    (T, H, width), S, G = index_q.shape, k.shape[0], k.shape[1]
    if T == 0 or S == 0:
        zeros = [torch.zeros_like(x) if need else None for x, need in zip(index, needs, strict=True)]
        return zeros[0], None if zeros[1] is None else zeros[1].float(), zeros[2]
    with torch.cuda.device(q.device):
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        heads = H // G
        E = _index_width(width, heads)
        q, k, index_q, index_k = *(aligned(_padded(x)) for x in (q, k)), *(_padded(x, E) for x in (index_q, index_k))
        D = q.shape[2]
        shape = dict(D=D, E=E, HG=heads)
        scale = softmax_scale * LOG2E
        common = (
            k.view(S, -1), index_k, weights.view(-1), *(x.view(-1) for x in sums), factor, key_start, key_end
        )  # fmt: skip
        if _formed_once(D, E, needs, deterministic):
            a, b, c = _once(q, index_q, common, shape, Tiles(G, TILE // heads, TILE, processors), scale)
            a, b = (x[..., :width].contiguous() for x in (a, b))
            return a if needs[0] else None, b, c.view_as(weights) if needs[2] else None
        query, key = (_tiles(f"head_gradients_{kind}", shape, q.device, sizes) for kind in ("query", "key"))
        slots = _SLOT_BYTES // (TILE * E * 4)
        rows = Tiles(G, TILE // heads, query["N"], processors)
        items = gradient_items(key_start, key_end, S, rows, key["N"] // heads, slots)
        d_index_q = d_index_k = d_weights = None
        if needs[0] or needs[2]:
            d_index_q, d_weights = torch.empty_like(index_q), torch.empty_like(weights)
            count = items.query.numel() // 8
            load_kernel("head_gradients_query", **shape, **query)(
                _rows(q, heads, TILE), common[0], _rows(index_q, heads, TILE), *common[1:], items.query,
                d_index_q.view(-1, E), d_weights.view(-1), H, T, count, min(count, processors), scale,
            )  # fmt: skip
        if needs[1]:
            total = torch.zeros_like(index_k, dtype=torch.float32)
            partials = total.new_empty(max(items.slots, 1) * TILE, E)
            count = items.key.numel() // 8
            if count:
                load_kernel("head_gradients_key", **shape, **key)(
                    _rows(q, heads, key["N"]), common[0], _rows(index_q, heads, key["N"]), *common[1:], items.key,
                    total, partials, H, G, T, count, min(count, processors), scale,
                )  # fmt: skip
            if items.slots:
                load_kernel("gradients_reduce", E=E)(total, partials, items.reduce, items.reduce.numel() // 4)
            d_index_k = total[:, :width].contiguous()
        if needs[0] and d_index_q is not None and width != E:
            d_index_q = d_index_q[..., :width].contiguous()
        return d_index_q if needs[0] else None, d_index_k, d_weights if needs[2] else None


def _formed_once(D: int, E: int, needs: Sequence[bool], deterministic: bool) -> bool:
    """Whether one kernel makes all gradients, with atomic additions; others make one of them faster."""
    exact = deterministic or torch.are_deterministic_algorithms_enabled()
    return not exact and ONCE_WIDTHS[0] >= D and ONCE_WIDTHS[1] >= E and needs[1] and (needs[0] or needs[2])


def _once(
    q: Tensor, index_q: Tensor, common: tuple[Tensor, ...], shape: dict[str, int], tiles: Tiles, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d_index_q [T, H, E], the float32 sum for d_index_k [S, E], d_index_weights [T·H]."""
    (T, H, E), S = index_q.shape, common[0].shape[0]
    items = attention_items(common[-2], common[-1], S, tiles)
    d_index_q, d_weights = torch.empty_like(index_q), torch.empty_like(common[2])
    total, count = torch.zeros(S, E, device=q.device), items.numel() // 8
    load_kernel("head_gradients_once", **shape)(
        _rows(q, shape["HG"], TILE), common[0], _rows(index_q, shape["HG"], TILE), *common[1:], items,
        d_index_q.view(-1, E), d_weights, total, H, T, count, min(count, tiles.processors), scale,
    )  # fmt: skip
    return d_index_q, total.view(S, -1, 4, 2, 2).transpose(2, 3).reshape(S, E), d_weights


def shapes(D: int, V: int, E: int, heads: int) -> dict[str, dict[str, int]]:
    """Of each kernel with tiles to choose: the widths that it works on, for `heads` heads of a key head."""
    E = _index_width(E, heads)
    gradients = dict(D=_width(D), E=E, HG=heads)
    return {
        "attention": dict(D=_width(D), V=_width(V), E=E, HG=heads),
        "head_gradients_query": gradients, "head_gradients_key": gradients,
    }  # fmt: skip


def prepare(
    q: Tensor, k: Tensor, V: int, E: int, needs: Sequence[bool] = (True, True, True), deterministic: bool = True
) -> None:
    """Has every kernel of the call and of its gradients compiled, those that are missing side by side.

    V: width of the values, 0 for `statistics`. needs, deterministic: as in `per_head_gradients`.
    """
    from flash_indexer.kernels.cache import prepare as compile_missing

    found = shapes(q.shape[2], V, E, q.shape[1] // k.shape[1])
    once = _formed_once(found["attention"]["D"], found["attention"]["E"], needs, deterministic)
    if once or not (needs[0] or needs[2]):
        gradients = found.pop("head_gradients_query")
    if once or not needs[1]:
        del found["head_gradients_key"]
    kernels = [(name, tuple((shape | _tiles(name, shape, q.device)).items())) for name, shape in found.items()]
    if once:
        kernels.append(("head_gradients_once", tuple(gradients.items())))
    elif needs[1]:
        kernels.append(("gradients_reduce", (("E", found["attention"]["E"]),)))
    if V == 0 and any(needs):
        kernels.append(("scale", ()))
    compile_missing(*kernels)


def _tiles(kernel: str, shape: dict[str, int], device: torch.device, given: Sizes | None = None) -> dict[str, int]:
    """Static sizes besides the shape: those given, or the ones chosen for the GPU."""
    from flash_indexer.kernels import tuned

    if given is not None and kernel in given:
        return dict(given[kernel])
    return dict(tuned.sizes(kernel, torch.cuda.get_device_properties(device).name, shape))


def _heads(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    index: tuple[Tensor, Tensor, Tensor] | None,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    sizes: Sizes | None,
) -> Heads:
    """Without values, out is the entropy."""
    (T, H, _), (S, G, _) = q.shape, k.shape
    width, heads = 0 if v is None else v.shape[2], H // G
    with torch.cuda.device(q.device):
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        lse = torch.empty(T, H, device=q.device)
        if T == 0 or S == 0:
            kl = None if index is None else torch.zeros_like(lse)
            out = torch.zeros_like(lse) if v is None else q.new_zeros(T, H, width)
            return Heads(out, lse.fill_(-torch.inf), lse if index is not None else None, kl)
        q, k = (aligned(_padded(x)) for x in (q, k))
        v = k if v is None else aligned(_padded(v))  # without values: not read
        D, V = q.shape[2], _width(width)
        E = 0 if index is None else _index_width(index[0].shape[2], heads)
        shape = dict(D=D, V=V, E=E, HG=heads)
        static = _tiles("attention", shape, q.device, sizes)
        items = attention_items(key_start, key_end, S, Tiles(G, TILE // heads, static["BN"], processors))
        out = q.new_empty(T, H, V) if V else torch.empty_like(lse)
        index_q, index_k, weights = (q, k.view(S, -1), lse) if index is None else index  # without one: not read
        if index is not None:
            index_q, index_k = _padded(index_q, E), _padded(index_k, E)
        lse_index, kl = (lse, lse) if index is None else (torch.empty_like(lse), torch.empty_like(lse))
        count = items.numel() // 8
        load_kernel("attention", **shape, **static)(
            _rows(q, heads, TILE), k.view(S, -1), v.view(S, -1), _rows(index_q, heads, TILE), index_k,
            weights.view(-1), key_start, key_end, items, _rows(out, heads, TILE) if V else out.view(-1), lse.view(-1),
            lse_index.view(-1), kl.view(-1), H, T, count, min(count, processors), softmax_scale * LOG2E,
        )  # fmt: skip
        out = out if width == V else out[..., :width].contiguous()
    return Heads(out, lse, None if index is None else lse_index, None if index is None else kl)


def _rows(x: Tensor, heads: int, rows: int) -> Tensor:
    """x [T, H, n] as tiles of `rows` rows are copied: token by token from [T·H, n], or head by head from [T, H·n]."""
    return x.view(-1, x.shape[2]) if heads > rows // heads else x.view(x.shape[0], -1)


def _width(n: int) -> int:
    return -(-n // 64) * 64


def _index_width(E: int, heads: int) -> int:
    """E, or 64 for 32 where a copy of part of a tile would begin between multiples of 128 bytes."""
    odd = any(max(heads, rows // heads) % 2 for rows in (TILE // 2, TILE))
    return 64 if E == 32 and odd else E


def _padded(x: Tensor, width: int | None = None) -> Tensor:
    """The last dimension filled up with zeros, to a multiple of 64: they change neither logits nor outputs."""
    width = _width(x.shape[-1]) if width is None else width
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _mla(q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, softmax_scale: float) -> Heads:
    (T, H, D), S = q.shape, k.shape[0]
    with torch.cuda.device(q.device):
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        out, lse = q.new_zeros(T, H, v.shape[2]), torch.full((T, H), -torch.inf, device=q.device)
        if T and S:
            items = latent_items(key_start, key_end, S, H, processors)
            count = items.numel() // 8
            load_kernel("attention_mla")(
                aligned(q).view(-1, D), aligned(k).view(S, D), key_start, key_end, items, out.view(T * H, -1),
                lse.view(-1), H, count, min(count, processors), softmax_scale * LOG2E,
            )  # fmt: skip
    return Heads(out, lse, None, None)
