"""Checks of shape, dtype and device: the one place where the operators' tensors are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

TARGETS = ("mean", "per_head", "sum_logits")
_TOKEN_INPUTS = ("lse", "token_weight")


class Sizes(NamedTuple):
    """The sizes of one call, by the shape legend."""

    T: int
    S: int
    H: int
    G: int
    D: int
    I: int
    E: int


def check_index_inputs(op: str, index_q: Tensor, index_k: Tensor, index_weights: Tensor) -> tuple[int, int, int, int]:
    """Checks index_q [T, I, E], index_k [S, E], index_weights [T, I]; returns T, S, I, E."""
    _rank(op, "index_q", index_q, "[T, I, E]", 3)
    T, I, E = index_q.shape
    if I == 0:
        raise ValueError(f"{op}: index_q must have a head at least, got {list(index_q.shape)}")
    _rank(op, "index_k", index_k, "[S, E]", 2)
    S = index_k.shape[0]
    _shape(op, "index_k", index_k, "[S, E]", (S, E), free=1)
    _shape(op, "index_weights", index_weights, "[T, I]", (T, I))
    return T, S, I, E


def check_indexer_kl(
    tensors: dict[str, Tensor | None],
    key_start: Tensor,
    key_end: Tensor,
    target: str,
    softmax_scale: float,
    op: str = "indexer_kl",
) -> Sizes:
    """Checks every argument of `indexer_kl`; tensors holds q, k, index_q, index_k, index_weights, lse, token_weight."""
    sizes = check_teacher_and_index(op, tensors, target, softmax_scale)
    check_interval_tensors(op, key_start, key_end, sizes.T, cast("Tensor", tensors["q"]).device)
    return sizes


def check_teacher_and_index(
    op: str,
    tensors: dict[str, Tensor | None],
    target: str,
    softmax_scale: float,
    constants: tuple[str, ...] = ("q", "k", *_TOKEN_INPUTS),
) -> Sizes:
    """Checks q, k, index_q, index_k, index_weights, lse, token_weight; constants: which of them get no gradient."""
    present = cast("dict[str, Tensor]", {n: x for n, x in tensors.items() if x is not None or n not in _TOKEN_INPUTS})
    q, k, index_q, index_k = (present[name] for name in ("q", "k", "index_q", "index_k"))
    if target not in TARGETS:
        raise ValueError(f"{op}: target must be one of {', '.join(map(repr, TARGETS))}, got {target!r}")
    T, H, D, S, G = _heads(op, q, k)
    _rank(op, "index_q", index_q, "[T, I, E]", 3)
    _shape(op, "index_q", index_q, "[T, I, E]", (T, *index_q.shape[1:]))
    _, _, I, E = check_index_inputs(op, index_q, index_k, present["index_weights"])
    _shape(op, "index_k", index_k, "[S, E]", (S, E))
    if target == "per_head" and I != H:
        raise ValueError(
            f'{op}: target="per_head" needs as many index heads as teacher heads: I == H, got I={I}, H={H}'
        )
    if "lse" in present:
        if target == "sum_logits":
            raise ValueError(f'{op}: lse is not used by target="sum_logits"; pass lse=None')
        _shape(op, "lse", present["lse"], "[T, H]", (T, H))
    if "token_weight" in present:
        _shape(op, "token_weight", present["token_weight"], "[T]", (T,))
    check_dtypes(op, present)
    _plain(op, present)
    for name in constants:
        if name in present and present[name].requires_grad:
            raise ValueError(f"{op}: {name} is a constant but requires grad; detach: the main model is frozen")
    _scale(op, softmax_scale)
    return Sizes(T, S, H, G, D, I, E)


def check_softcap(op: str, softcap: float | None, target: str = "mean") -> None:
    """Raises ValueError unless softcap is None or a positive number, and the target one of softmax probabilities."""
    if softcap is None:
        return
    if isinstance(softcap, bool) or not isinstance(softcap, int | float) or not 0 < softcap < math.inf:
        raise ValueError(
            f"{op}: softcap must be None or positive and finite (the model's attn_logit_softcapping), got {softcap!r}"
        )
    if target == "sum_logits":
        raise ValueError(
            f'{op}: softcap must be None with target="sum_logits", which sums logits before any function of them, got '
            f'{softcap}; use target="mean"'
        )


def softcap_refusal(softcap: float | None) -> str | None:
    """Why no kernel takes logits with a softcap; None where there is none."""
    return None if softcap is None else "the kernels have no softcap of the logits"


def check_workspace(op: str, workspace_bytes: int) -> None:
    """Raises ValueError unless workspace_bytes is positive, TypeError for a float."""
    if isinstance(workspace_bytes, float):
        raise TypeError(f"{op}: workspace_bytes must be an integer, got {workspace_bytes}")
    if workspace_bytes <= 0:
        raise ValueError(f"{op}: workspace_bytes must be positive, got {workspace_bytes}")


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, scale: float) -> None:
    """Checks every argument of attention: q [T, H, D], k [S, G, D], v [S, G, V]."""
    T = _heads(op, q, k)[0]
    check_value(op, k, v)
    check_interval_tensors(op, key_start, key_end, T, q.device)
    check_dtypes(op, dict(q=q, k=k, v=v))
    for name, x in (("q", q), ("k", k)):
        if x.requires_grad:
            raise ValueError(f"{op}: {name} is a constant but requires grad; detach: the main model is frozen")
    _scale(op, scale)


def check_value(op: str, k: Tensor, v: Tensor) -> None:
    """Checks v: [S, G, V] like k, a constant."""
    _rank(op, "v", v, "[S, G, V]", 3)
    _shape(op, "v", v, "[S, G, V]", (*k.shape[:2], v.shape[2]), free=0)
    check_dtypes(op, dict(k=k, v=v))
    if v.requires_grad:
        raise ValueError(f"{op}: v is a constant but requires grad; detach: the main model is frozen")


def check_sparse_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor | None, value_dim: int | None, softmax_scale: float
) -> int:
    """Checks q [T, H, D], k [S, G, D] and v [S, G, V], or value_dim without v; returns V."""
    _, _, D, S, G = _heads(op, q, k)
    tensors = dict(q=q, k=k)
    if v is None:
        if not isinstance(value_dim, int) or not 1 <= value_dim <= D:
            raise ValueError(
                f"{op}: value_dim must be from 1 to D = {D} where v is None (the values are k[..., :value_dim]), got "
                f"{value_dim}"
            )
        width = value_dim
    else:
        _rank(op, "v", v, "[S, G, V]", 3)
        width = v.shape[2]
        _shape(op, "v", v, "[S, G, V]", (S, G, width))
        if value_dim is not None:
            raise ValueError(f"{op}: value_dim must be None where v is given, got {value_dim}; drop one of them")
        tensors["v"] = v
    check_dtypes(op, tensors)
    _plain(op, tensors)
    _scale(op, softmax_scale)
    return width


def check_sinks(op: str, sinks: Tensor | None, q: Tensor) -> None:
    """Checks sinks [H] beside q [T, H, D]; None is none."""
    if sinks is None:
        return
    _rank(op, "sinks", sinks, "[H]", 1)
    _shape(op, "sinks", sinks, "[H]", q.shape[1:2])
    if not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"{op}: sinks must be floating point on {q.device} like the queries, got {sinks.dtype} on {sinks.device}"
        )


def check_selection_tensors(op: str, indices: Tensor, count: Tensor, scores: Tensor, like: Tensor) -> None:
    """Checks indices int32 [T, K], count int32 [T], scores [T, K] beside `like` [T, ...]; not their contents."""
    _rank(op, "selection.indices", indices, "[T, K]", 2)
    T, K = len(like), indices.shape[1]
    _shape(op, "selection.indices", indices, "[T, K]", (T, K))
    _shape(op, "selection.count", count, "[T]", (T,))
    _shape(op, "selection.scores", scores, "[T, K]", (T, K))
    for name, x in (("indices", indices), ("count", count)):
        if x.dtype != torch.int32:
            raise TypeError(f"{op}: selection.{name} must be int32, got {x.dtype}; use .int()")
    if not scores.is_floating_point():
        raise TypeError(f"{op}: selection.scores must be floating point, got {scores.dtype}")
    for name, x in (("indices", indices), ("count", count), ("scores", scores)):
        if x.device != like.device:
            raise ValueError(f"{op}: selection.{name} must be on {like.device} like the queries, got {x.device}")


def check_topk(op: str, topk: int, always: tuple[int, int]) -> None:
    """Checks topk >= 1 and always = (first, last), both non-negative and topk at most together."""
    if not isinstance(topk, int):
        raise TypeError(f"{op}: topk must be an integer, got {topk!r}")
    if topk < 1:
        raise ValueError(f"{op}: topk must be at least 1, got {topk}")
    if not (isinstance(always, tuple) and len(always) == 2 and all(isinstance(n, int) and n >= 0 for n in always)):
        raise ValueError(f"{op}: always must be (first, last), two counts of keys from 0, got {always!r}")
    if sum(always) > topk:
        raise ValueError(
            f"{op}: always must hold at most topk = {topk} keys together, got {always[0]} first and {always[1]} last; "
            "raise topk or lower one of them"
        )


def check_kl_mode(op: str, kl: str, kl_scale: Tensor | None, kl_out: Tensor | None, q: Tensor) -> None:
    """Checks kl, and kl_scale [] and kl_out [T], which belong to kl="backward" alone."""
    if kl not in ("forward", "backward"):
        raise ValueError(f"{op}: kl must be 'forward' or 'backward', got {kl!r}")
    for name, x, legend, shape in (("kl_scale", kl_scale, "a scalar []", ()), ("kl_out", kl_out, "[T]", q.shape[:1])):
        if x is None:
            continue
        if kl == "forward":
            raise ValueError(
                f'{op}: {name} must be None with kl="forward", got a tensor; scale the loss, or choose kl="backward"'
            )
        _shape(op, name, x, legend, tuple(shape))
        if not x.is_floating_point() or x.device != q.device or x.requires_grad:
            raise ValueError(
                f"{op}: {name} must be floating point, on {q.device} like the queries and without requires_grad, got "
                f"{x.dtype} on {x.device}, requires_grad={x.requires_grad}"
            )
    if kl == "backward" and torch.compiler.is_compiling():
        raise RuntimeError(
            f'{op}: kl="backward" can not be compiled, since its backward writes to a buffer of the caller\'s; use '
            'kl="forward", or leave this call out of the compiled part'
        )


def check_interval_tensors(op: str, key_start: Tensor, key_end: Tensor, num_queries: int, device: torch.device) -> None:
    """Checks key_start and key_end: int32 [T] on the queries' device. Their contents are `check_intervals`' part."""
    for name, x in (("key_start", key_start), ("key_end", key_end)):
        _shape(op, name, x, "[T]", (num_queries,))
        if x.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be int32, got {x.dtype}; use {name}.int()")
        if x.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like the queries, got {x.device}")


def check_dtypes(op: str, tensors: dict[str, Tensor]) -> None:
    """On the CPU one of float32, float64 throughout; elsewhere bfloat16 vectors, float32 weights, lse, token_weight."""
    reference_name, reference = next(iter(tensors.items()))
    on_cpu = reference.device.type in ("cpu", "meta")
    for name, x in tensors.items():
        if x.device != reference.device:
            raise ValueError(f"{op}: {name} must be on {reference.device} like {reference_name}, got {x.device}")
        if on_cpu and reference.dtype in (torch.float32, torch.float64):
            if x.dtype != reference.dtype:
                raise TypeError(
                    f"{op}: {name} must be {reference.dtype} like {reference_name}, got {x.dtype}; "
                    "on the CPU use float32 throughout or float64 throughout"
                )
            continue
        if reference.device.type == "cpu":
            raise TypeError(
                f"{op}: {name} must be float32 or float64 on the CPU, got {x.dtype}; convert with {name}.float()"
            )
        expected = torch.float32 if name in ("index_weights", *_TOKEN_INPUTS) else torch.bfloat16
        if x.dtype != expected:
            raise TypeError(f"{op}: {name} must be {expected} on {x.device.type}, got {x.dtype}")


def _heads(op: str, q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    """Checks q [T, H, D] and k [S, G, D]; returns T, H, D, S, G."""
    _rank(op, "q", q, "[T, H, D]", 3)
    T, H, D = q.shape
    _rank(op, "k", k, "[S, G, D]", 3)
    S, G = k.shape[:2]
    _shape(op, "k", k, "[S, G, D]", (S, G, D), free=2)
    if G == 0 or H == 0 or H % G:
        raise ValueError(f"{op}: q's head count must be a multiple of k's: H % G == 0, got H={H}, G={G}")
    return T, H, D, S, G


def _tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")


def _scale(op: str, scale: object) -> None:
    if not isinstance(scale, int | float):
        raise TypeError(f"{op}: softmax_scale must be a number (the model's own, e.g. D ** -0.5), got {scale!r}")
    if not 0 < scale < math.inf:
        raise ValueError(
            f"{op}: softmax_scale must be positive and finite (the model's own, e.g. D ** -0.5), got {scale}"
        )


def _plain(op: str, present: Mapping[str, Tensor]) -> None:
    """Gradients are formed beside the loss, where torch.func and forward mode would find none and say nothing."""
    if torch.compiler.is_compiling():
        return
    for name, x in present.items():
        if torch._C._functorch.is_functorch_wrapped_tensor(x) or unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise ValueError(
                f"{op}: {name} must be a plain tensor, got one of torch.func (vmap, grad, jvp) or of forward-mode "
                "differentiation; call the operator outside of these, several sequences packed by key_start and "
                "key_end, and differentiate the loss by backward or torch.autograd.grad"
            )


def _rank(op: str, name: str, x: Tensor, legend: str, rank: int) -> None:
    _tensor(op, name, x)
    if x.ndim != rank:
        raise ValueError(f"{op}: {name} must be {legend}, got {list(x.shape)}")


def _shape(op: str, name: str, x: Tensor, legend: str, expected: tuple[int, ...], free: int = 0) -> None:
    """The first `free` sizes define the legend's letters themselves and are printed as *."""
    _tensor(op, name, x)
    if tuple(x.shape) != expected:
        sizes = ", ".join("*" if i < free else str(n) for i, n in enumerate(expected))
        raise ValueError(f"{op}: {name} must be {legend} = [{sizes}], got {list(x.shape)}")
