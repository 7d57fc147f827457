"""What runs beside the sparse stage's steps: other libraries' kernels at the same sizes, held to ours before.

    dsa_*            cuDNN's kernels for selected keys (package nvidia-cudnn-frontend, where it is installed), at MLA's
                     widths; their additions come in any order
    cudnn_*, fa2_*   dense causal attention, of causal squares
    flex_*           FlexAttention with a bit for each (query, key), of causal squares of random keys
    torch_*          the blockwise torch body, which gathers, of few queries

A library that is absent, fails or does not compute what ours does is named with the reason and not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flash_indexer.bench.baselines import attention_contestants, flex_attention_with_bits
from flash_indexer.bench.sparse_check import Answer
from flash_indexer.bench.sparse_problem import CAUSAL, LATE, SparseSize, Tensors
from flash_indexer.bench.timing import Size
from flash_indexer.ops import Needs, bodies, sparse_backward, sparse_forward

CLOSE = 2**-5  # relative difference of norms; both are from bfloat16 products
Contestants = dict[str, Callable[[], Any]]


def peers(size: SparseSize, x: Tensors, answers: Mapping[str, Answer]) -> tuple[Contestants, dict[str, str]]:
    """The contestants by name, and why those that are absent are."""
    beside: Contestants = {}
    reasons: dict[str, str] = {}
    if size.D > size.V:
        _add(beside, reasons, "dsa", lambda: selected_keys_of_cudnn(size, x, answers))
        return beside, reasons
    if size.T <= LATE:
        return in_torch(size, x), {}
    beside, reasons = attention_contestants(Size(size.H, size.G, size.D, 0, 0, (size.T,), size.V))
    if size.selection == CAUSAL and size.H % size.G == 0 and (size.H // size.G).bit_count() == 1:
        _add(beside, reasons, "flex", lambda: flex(x, answers))
    return beside, reasons


def selected_keys_of_cudnn(size: SparseSize, x: Tensors, answers: Mapping[str, Answer]) -> Contestants:
    """cuDNN's DSA kernels. Its backward and target take our out and lse; its gradients take our target and scores.

    Raises:
        ImportError: where the package or a part of it is missing. RuntimeError: where a result is not close to ours.
    """
    DSA = importlib.import_module("cudnn").DSA

    ours = next((answer for answer in reversed(list(answers.values())) if answer.p_sum is not None), None)
    if ours is None or ours.out is None or ours.lse is None or ours.p_sum is None:
        raise RuntimeError("nothing of ours to hold it to")
    indices, count, scores = x.selection
    first = answers["one order"]  # it has the selection and the index gradients
    out, lse, p_sum, k = ours.out, ours.lse, ours.p_sum, x.k[:, 0]
    no_sink = torch.full((size.H,), -1e30, device=x.q.device)
    index = x.index_q[None], x.index_k[None], x.index_weights[None].to(x.index_q.dtype)
    offset = torch.tensor([size.S - size.T], dtype=torch.int32, device=x.q.device)
    one = torch.ones(1, device=x.q.device)
    absent = indices < 0
    p = (p_sum / p_sum.sum(-1, keepdim=True))[None]
    predicted = scores.softmax(-1)[None]
    target = p.clone()  # it is written to

    def backward() -> Any:
        return DSA.sparse_attention_backward_wrapper(
            x.q, k, out, x.d_out, lse, no_sink, indices, softmax_scale=size.D**-0.5, topk_length=count
        )

    def teacher() -> Any:
        return DSA.sparse_attn_score_recompute_wrapper(
            x.q[None], k[None], lse[None], indices[None], size.D**-0.5, qhead_per_kv_head=size.H,
            topk_length=count[None],
        )  # fmt: skip

    def index_scores() -> Any:
        return DSA.sparse_indexer_score_recompute_wrapper(
            *index, indices[None], qhead_per_kv_head=size.I, topk_length=count[None]
        )

    def index_gradients() -> Any:
        return DSA.indexer_backward_wrapper(
            index[0], index[2], index[1], target, predicted, indices[None], one
        )  # fmt: skip

    def all_scores() -> Tensor:
        found: Tensor = DSA.indexer_forward_wrapper(*index, ratio=1, qhead_per_kv_head=size.I, q_causal_offsets=offset)[
            "scores"
        ]
        return found

    given = all_scores()[0]

    def topk() -> Any:
        return DSA.indexer_top_k_wrapper(given, x.key_end, size.K, deterministic=True)

    made, gradients = backward(), index_gradients()
    theirs = teacher()["target"][0].masked_fill(absent, 0.0)
    _hold("dsa_backward", made["dq"], made["dkv"], ours=(ours.dq, None if ours.dk is None else ours.dk[:, 0]))
    _hold("dsa_target", theirs / theirs.sum(-1, keepdim=True), ours=(p[0],))
    _hold("dsa_index_gradients", gradients["d_index_q"][0], ours=(first.d_index_q,))
    if first.selection is not None:
        best = first.selection.scores
        _hold("dsa_topk", topk()["values"].sort(-1).values, ours=(best.sort(-1).values,))
    return {
        "dsa_scores": all_scores, "dsa_topk": topk, "dsa_backward": backward, "dsa_target": teacher,
        "dsa_index_scores": index_scores, "dsa_index_gradients": index_gradients,
    }  # fmt: skip


def flex(x: Tensors, answers: Mapping[str, Answer]) -> Contestants:
    """FlexAttention; its forward gives our out."""
    forward, backward = flex_attention_with_bits(x.q, x.k, x.values, x.selection.indices, x.d_out)
    _hold("flex", forward()[0].transpose(0, 1), ours=(answers["one order"].out,))
    backward()
    return {"flex_forward": forward, "flex_backward": backward}


def in_torch(size: SparseSize, x: Tensors) -> Contestants:
    """The torch body's forward, and its backward with the target."""
    problem = x.problem(size)
    needs = Needs(True, True, x.v is not None, True)

    def run(step: Callable[[], Any]) -> Any:
        with bodies.use(bodies.TORCH):
            return step()

    out, lse = run(lambda: sparse_forward(problem))
    return {
        "torch_forward": lambda: run(lambda: sparse_forward(problem)),
        "torch_backward": lambda: run(lambda: sparse_backward(problem, x.d_out, out, lse, needs)),
    }


def _add(beside: Contestants, reasons: dict[str, str], name: str, make: Callable[[], Contestants]) -> None:
    """Any failure of another library is a reason, and no failure of ours."""
    try:
        made = make()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        beside |= made
    except Exception as error:
        reasons[name] = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:200]


def _hold(name: str, *theirs: Tensor, ours: tuple[Tensor | None, ...]) -> None:
    """Raises RuntimeError where norms differ by more than CLOSE: then it does not compute what ours does."""
    for mine, other in zip(ours, theirs, strict=True):
        if mine is None:
            continue
        mine, other = (y.float().nan_to_num(0.0, 0.0, 0.0) for y in (mine, other))  # -inf behind the last key
        difference = float((mine - other).norm() / mine.norm())
        if not difference <= CLOSE:
            raise RuntimeError(f"{name} differs from ours by {difference:.1e} of its norm")
