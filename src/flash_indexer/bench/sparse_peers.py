"""What runs beside the sparse stage's steps: other libraries' kernels at the same sizes, held to ours before.

    dsa_*            cuDNN's kernels for selected keys (`sparse_cudnn`), at MLA's widths
    cudnn_*, fa2_*   dense causal attention, of causal squares
    flex_*           FlexAttention with a bit for each (query, key), of causal squares of random keys
    torch_*          the blockwise torch body, which gathers, of few queries

A library that is absent, fails or does not compute what ours does is named with the reason and not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_indexer.bench.baselines import attention_contestants, flex_attention_with_bits
from flash_indexer.bench.sparse_check import Answer
from flash_indexer.bench.sparse_cudnn import SelectedKeys
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
        return selected_keys_of_cudnn(size, x, answers)
    if size.T <= LATE:
        return in_torch(size, x), {}
    beside, reasons = attention_contestants(Size(size.H, size.G, size.D, 0, 0, (size.T,), size.V))
    if size.selection == CAUSAL and size.H % size.G == 0 and (size.H // size.G).bit_count() == 1:
        _add(beside, reasons, "flex", lambda: flex(x, answers))
    return beside, reasons


def selected_keys_of_cudnn(
    size: SparseSize, x: Tensors, answers: Mapping[str, Answer]
) -> tuple[Contestants, dict[str, str]]:
    """cuDNN's kernels for selected keys, each held to ours, and why those are absent that are."""
    beside: Contestants = {}
    reasons: dict[str, str] = {}
    ready: list[SelectedKeys] = []

    def library() -> Contestants:
        ready.append(SelectedKeys(size, x, answers))
        return {}

    def held(name: str) -> Contestants:
        call, pairs = ready[0].by_name()[name]
        _hold(name, *pairs(call()))
        return {name: call}

    _add(beside, reasons, "dsa", library)
    for name in ready[0].by_name() if ready else ():
        _add(beside, reasons, name, partial(held, name))
    return beside, reasons


def flex(x: Tensors, answers: Mapping[str, Answer]) -> Contestants:
    """FlexAttention; its forward gives our out."""
    forward, backward = flex_attention_with_bits(x.q, x.k, x.values, x.selection.indices, x.d_out)
    _hold("flex", (answers["one order"].out, forward()[0].transpose(0, 1)))
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


def _hold(name: str, *pairs: tuple[Tensor | None, Tensor]) -> None:
    """Raises RuntimeError where ours, of each pair the first, and theirs differ in norm by more than CLOSE."""
    for mine, other in pairs:
        if mine is None:
            continue
        mine, other = (y.float().nan_to_num(0.0, 0.0, 0.0) for y in (mine, other))  # -inf behind the last key
        difference = float((mine - other).norm() / mine.norm())
        if not difference <= CLOSE:
            raise RuntimeError(f"{name} differs from ours by {difference:.1e} of its norm")
