"""The public sparse_indexer_kl: judged by reference.py, and its contract with autograd and compilers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import IndexerKL, indexer_kl, select_keys, sparse_attention, sparse_indexer_kl
from flash_indexer.ops.sparse import torch_index
from flash_indexer.ops.sparse.kl_op import sparse_kl_op
from flash_indexer.testing import SHAPES

D_LOSS = -1.7
INDEX = ("d_index_q", "d_index_k", "d_index_weights")


def call(case: Any, leaves: list[Tensor], **options: Any) -> IndexerKL:
    fixed = dict(softmax_scale=case.x.softmax_scale)
    return sparse_indexer_kl(case.x.q, case.x.k, *leaves, case.selection, **(fixed | options))


def measure(case: Any, **options: Any) -> dict[str, Tensor]:
    leaves = case.tensors()[3:]
    result = call(case, leaves, **options)
    assert not result.kl.requires_grad and not result.entropy.requires_grad
    (D_LOSS * result.loss).backward()
    return dict(loss=result.loss.detach(), kl=result.kl, **dict(zip(INDEX, (x.grad for x in leaves), strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(make_case: Callable[..., Any], shape: str, dtype: torch.dtype) -> None:
    for topk in (1, 7, 500):
        case = make_case(shape, dtype=dtype, topk=topk)
        lse = sparse_attention(case.x.q, case.x.k, case.v, case.selection, softmax_scale=case.x.softmax_scale).lse
        ways = [(30_000, case.x.token_weight, None), (2**29, None, None)]
        for workspace_bytes, weight, given in [(1, None, lse)] * (topk == 7) + ways:
            got = measure(case, token_weight=weight, lse=given, workspace_bytes=workspace_bytes)
            case.judge(got, token_weight=weight)


@pytest.mark.parametrize("shape", ["packed", "fewer_keys"])
def test_of_all_keys_it_is_the_dense_loss(make_case: Callable[..., Any], shape: str) -> None:
    case = make_case(shape, topk=1000)
    got, leaves = measure(case), case.tensors()[3:]
    dense = indexer_kl(case.x.q, case.x.k, *leaves, softmax_scale=case.x.softmax_scale, **case.intervals)
    (D_LOSS * dense.loss).backward()
    for value, right in zip(got.values(), (dense.loss, dense.kl, *(x.grad for x in leaves)), strict=True):
        torch.testing.assert_close(value, right.detach())
    torch.testing.assert_close(call(case, leaves).entropy, dense.entropy)


def test_beyond_k_it_is_not(make_case: Callable[..., Any]) -> None:
    """An indexer that ranks the teacher's mass last: the dense loss sees it, the one over selected keys does not."""
    case = make_case("smollm2", topk=6)
    case = replace(case, x=replace(case.x, k=case.x.k + 4 * case.x.q.mean((0, 1))))
    p_rank = torch.einsum("thd,sgd->ts", case.x.q, case.x.k)
    worst = (-p_rank).masked_fill(torch.ones_like(p_rank).triu(1).bool(), -torch.inf)
    from flash_indexer.ops import top_keys

    case = replace(case, selection=top_keys(worst, *case.intervals.values(), 6))
    got, dense = measure(case), indexer_kl(
        case.x.q, case.x.k, *case.index, softmax_scale=case.x.softmax_scale, **case.intervals
    )  # fmt: skip
    case.judge(got)
    few = case.selection.count < torch.arange(1, len(case.x.q) + 1)
    assert few.sum() > 50 and bool(((got["kl"] - dense.kl).abs() > 1e-3)[few].all())


def test_a_dense_lse_weighs_heads_wrongly(make_case: Callable[..., Any]) -> None:
    """L1 hides a constant that is common to all heads, and the lse over all keys is none."""
    case = make_case("smollm2", topk=6)
    right = call(case, case.index, lse=None).kl
    shifted = sparse_attention(case.x.q, case.x.k, case.v, case.selection, softmax_scale=case.x.softmax_scale).lse
    torch.testing.assert_close(call(case, case.index, lse=shifted + 0.7).kl, right)
    assert (call(case, case.index, lse=case.x.lse).kl - right).abs()[7:].max() > 1e-2


@pytest.mark.parametrize("kind", ["zero", "negative"])
def test_token_weights(make_case: Callable[..., Any], kind: str) -> None:
    case = make_case("packed")
    weight = {"zero": 0 * case.x.token_weight, "negative": -case.x.token_weight.abs()}[kind]
    got = measure(case, token_weight=weight)
    case.judge(got, token_weight=weight)
    if kind == "zero":
        assert got["loss"] == 0 and all((got[name] == 0).all() for name in INDEX) and (got["kl"] > 0).any()


def test_queries_without_keys(make_case: Callable[..., Any]) -> None:
    """Padding with NaN in the indexer's inputs, which nobody selects and which selects nothing, leaks nowhere."""
    case = make_case("fewer_keys", dtype=torch.float32)
    empty = case.selection.count == 0
    clean = measure(case)
    assert empty.any() and not empty.all()
    for value in (clean["kl"], clean["d_index_q"], clean["d_index_weights"]):
        assert (value[empty] == 0).all() and (value[~empty] != 0).any()
    index_q, weights = case.x.index_q.clone(), case.x.index_weights.clone()
    index_q[empty], weights[empty] = torch.nan, torch.nan
    poisoned = measure(replace(case, x=replace(case.x, index_q=index_q, index_weights=weights)))
    loose = [name for name in clean if name not in ("d_index_q", "d_index_weights")]
    for name in loose:
        torch.testing.assert_close(poisoned[name], clean[name])
    for name in ("d_index_q", "d_index_weights"):
        assert (poisoned[name][empty] == 0).all()
        torch.testing.assert_close(poisoned[name][~empty], clean[name][~empty])


def test_no_query_has_a_key(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    none = case.selection._replace(count=0 * case.selection.count)
    got = measure(replace(case, selection=none))
    assert all((value == 0).all() for value in got.values())
    no_slots = type(none)(none.indices[:, :0], none.count, none.scores[:, :0])
    assert all((value == 0).all() for value in measure(replace(case, selection=no_slots)).values())


def test_a_teacher_without_mass_is_nan_there_alone(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    lse = sparse_attention(case.x.q, case.x.k, case.v, case.selection, softmax_scale=case.x.softmax_scale).lse
    row = int(case.selection.count.argmax())
    lse[row] = 2000.0
    got = call(case, case.index, lse=lse)
    assert got.kl.isnan().nonzero().tolist() == [[row]] and got.loss.isnan()


def test_its_scores_are_those_of_its_arguments(make_case: Callable[..., Any]) -> None:
    """Not those of whoever selected: a selection of another indexer has other scores."""
    case = make_case("packed")
    stale = case.selection._replace(scores=torch.zeros_like(case.selection.scores))
    for value, right in zip(measure(replace(case, selection=stale)).values(), measure(case).values(), strict=True):
        assert torch.equal(value, right)


class Recomputed(torch.autograd.Function):
    """The operator with its loss computed anew in backward, because gradcheck calls backward repeatedly."""

    @staticmethod
    def forward(ctx: Any, case: Any, options: dict[str, Any], *leaves: Tensor) -> Tensor:
        ctx.problem = case, options, [leaf.detach().clone() for leaf in leaves]
        return call(case, ctx.problem[2], **options).loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        case, options, leaves = ctx.problem
        with torch.enable_grad():
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            loss = call(case, leaves, **options).loss
        return None, None, *torch.autograd.grad(loss, leaves, d_loss)


def test_gradcheck(make_case: Callable[..., Any]) -> None:
    case = make_case("packed", documents=((1, 1), (3, 5), (4, 2)), H=3, G=1, D=4, I=2, E=6, topk=3, seed=2)
    options = dict(token_weight=case.x.token_weight, workspace_bytes=2000)
    assert torch.autograd.gradcheck(lambda *x: Recomputed.apply(case, options, *x), case.tensors()[3:], eps=1e-7)


@pytest.mark.parametrize("needs", list(product([True, False], repeat=3)))
def test_every_subset_of_gradients(
    make_case: Callable[..., Any], needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("smollm2")
    whole, asked = measure(case), []
    inner = torch_index.index_gradients
    monkeypatch.setattr(torch_index, "index_gradients", lambda *x: asked.append(tuple(x[3])) or inner(*x))
    leaves = case.tensors((False,) * 3 + needs)[3:]
    result = call(case, leaves)
    assert result.loss.requires_grad == any(needs) and asked == [needs] * any(needs)
    if any(needs):
        (D_LOSS * result.loss).backward()
    for leaf, need, name in zip(leaves, needs, INDEX, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, whole[name], rtol=1e-13, atol=1e-14)


def test_second_and_double_backward_are_refused(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    leaves = case.tensors()[3:]
    loss = call(case, leaves).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="sparse_indexer_kl: backward already ran"):
        loss.backward()
    with pytest.raises(RuntimeError, match="sparse_indexer_kl: the loss has no second derivative"):
        torch.autograd.grad(call(case, leaves).loss, leaves, create_graph=True)


@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False], [False, False, False]])
def test_opcheck(make_case: Callable[..., Any], needs: list[bool]) -> None:
    case = make_case("cached_prefix", dtype=torch.float32)
    leaves = case.tensors((False,) * 3 + tuple(needs))[3:]
    for known in (False, True):
        arguments = (case.x.q, case.x.k, *leaves, *case.selection, None, case.x.token_weight.abs())
        torch.library.opcheck(sparse_kl_op, (*arguments, case.x.softmax_scale, known, True, 50_000, needs))


def test_compiled(make_case: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    case = make_case("packed")

    def step(q: Tensor, k: Tensor, index: list[Tensor], start: Tensor, end: Tensor) -> Tensor:
        chosen = select_keys(*index, key_start=start, key_end=end, topk=case.topk)
        loss = sparse_indexer_kl(q, k, 2 * index[0], index[1].sin(), index[2], chosen, softmax_scale=0.3).loss
        return D_LOSS * loss

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = case.tensors()[3:]
        loss = run(case.x.q, case.x.k, leaves, *case.intervals.values())
        loss.backward()
        results.append((loss.detach(), *(x.grad for x in leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(lse=lambda x: x[:, 1:]), ValueError, r"lse must be \[T, H\] = \[91, 9\]"),
        (dict(token_weight=lambda x: x[1:]), ValueError, r"token_weight must be \[T\] = \[91\]"),
        (dict(q=lambda x: x.requires_grad_()), ValueError, "q is a constant but requires grad"),
        (dict(lse=lambda x: x.requires_grad_()), ValueError, "lse is a constant but requires grad"),
        (dict(index_k=lambda x: x[1:]), ValueError, r"index_k must be \[S, E\] = \[89, 32\]"),
        (dict(softmax_scale=-1.0), ValueError, "softmax_scale must be positive"),
        (
            dict(selection=lambda s: s.rows(slice(1, None))),
            ValueError,
            r"selection.indices must be \[T, K\] = \[91, 7\]",
        ),
        (
            dict(selection=lambda s: s._replace(indices=s.indices + 89)),
            ValueError,
            "indices must be from 0 to S - 1 = 88",
        ),
        (dict(workspace_bytes=0), ValueError, "workspace_bytes must be positive"),
    ],
)
def test_refusals(make_case: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    case = make_case("packed")
    x = case.x
    values = dict(
        q=x.q.clone(), k=x.k, index_q=x.index_q, index_k=x.index_k, index_weights=x.index_weights,
        selection=case.selection, softmax_scale=0.5, lse=x.lse.clone(), token_weight=x.token_weight,
    )  # fmt: skip
    given = {name: change(values[name]) if callable(change) else change for name, change in changes.items()}
    with pytest.raises(error, match=message):
        sparse_indexer_kl(**(values | given))
