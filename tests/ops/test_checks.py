"""Every rejection of the operators: the argument, what it must be, what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from flash_indexer import indexer_kl, indexer_scores, warmup_attention
from flash_indexer.testing import Shape, make_inputs

SHAPE = Shape(((6, 6), (3, 3)), H=6, G=2, D=8, I=4, E=16)
T, S, H, G, D, I, E = 9, 9, 6, 2, 8, 4, 16
Change = Callable[[dict[str, Any]], Any]


def arguments() -> dict[str, Any]:
    x = make_inputs(SHAPE, seed=0)
    names = ("q", "k", "index_q", "index_k", "index_weights", "key_start", "key_end", "lse", "token_weight")
    return {name: getattr(x, name) for name in names} | dict(softmax_scale=x.softmax_scale)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_the_unchanged_arguments_are_accepted():
    assert indexer_kl(**arguments()).loss > 0


VALUE_ERRORS: list[tuple[dict[str, Any], str]] = [
    (dict(q=zeros(T, D)), r"q must be \[T, H, D\], got \[9, 8\]"),
    (dict(q=zeros(T, 1, H, D)), r"q must be \[T, H, D\], got \[9, 1, 6, 8\]"),
    (dict(k=zeros(S, D)), r"k must be \[S, G, D\], got \[9, 8\]"),
    (dict(k=zeros(S, G, D + 1)), r"k must be \[S, G, D\] = \[\*, \*, 8\], got \[9, 2, 9\]"),
    (dict(k=zeros(S, 4, D)), r"H % G == 0, got H=6, G=4"),
    (dict(k=zeros(S, 0, D)), r"H % G == 0, got H=6, G=0"),
    (dict(index_q=zeros(T, I * E)), r"index_q must be \[T, I, E\], got \[9, 64\]"),
    (dict(index_q=zeros(T + 1, I, E), index_weights=zeros(T + 1, I)), r"index_q must be .*= \[9, 4, 16\], got \[10,"),
    (dict(index_k=zeros(S, 1, E)), r"index_k must be \[S, E\], got \[9, 1, 16\]"),
    (dict(index_k=zeros(S, E + 1)), r"index_k must be \[S, E\] = \[\*, 16\], got \[9, 17\]"),
    (dict(index_k=zeros(S - 1, E)), r"index_k must be \[S, E\] = \[9, 16\], got \[8, 16\]"),
    (dict(index_weights=zeros(T, I + 1)), r"index_weights must be \[T, I\] = \[9, 4\], got \[9, 5\]"),
    (dict(index_weights=zeros(T)), r"index_weights must be \[T, I\] = \[9, 4\], got \[9\]"),
    (dict(lse=zeros(H, T)), r"lse must be \[T, H\] = \[9, 6\], got \[6, 9\]"),
    (dict(token_weight=zeros(T, 1)), r"token_weight must be \[T\] = \[9\], got \[9, 1\]"),
    (dict(token_weight=zeros()), r"token_weight must be \[T\] = \[9\], got \[\]"),
    (dict(key_start=zeros(T - 1, dtype=torch.int32)), r"key_start must be \[T\] = \[9\], got \[8\]"),
    (dict(key_end=zeros(1, T, dtype=torch.int32)), r"key_end must be \[T\] = \[9\], got \[1, 9\]"),
    (dict(target="max"), r"target must be one of 'mean', 'per_head', 'sum_logits', got 'max'"),
    (dict(target="per_head"), r'target="per_head" needs .* I == H, got I=4, H=6'),
    (dict(target="sum_logits"), r'lse is not used by target="sum_logits"; pass lse=None'),
    (dict(softmax_scale=0.0), r"softmax_scale must be positive .*, got 0.0"),
    (dict(softmax_scale=-0.125), r"softmax_scale must be positive .*, got -0.125"),
    (dict(softmax_scale=float("nan")), r"softmax_scale must be positive .*, got nan"),
    (dict(softmax_scale=float("inf")), r"softmax_scale must be positive and finite .*, got inf"),
    (dict(q=zeros(T, 0, D)), r"H % G == 0, got H=0, G=2"),
    (dict(softcap=0.0), r"softcap must be None or positive and finite .*, got 0.0"),
    (dict(softcap=float("inf")), r"softcap must be None or positive and finite .*, got inf"),
    (dict(softcap=True), r"softcap must be None or positive and finite .*, got True"),
    (dict(softcap=2.0, target="sum_logits", lse=None), r'softcap must be None with target="sum_logits", .*, got 2.0'),
    (dict(index_q=zeros(T + 1, I, E)), r"index_q must be \[T, I, E\] = \[9, 4, 16\], got \[10, 4, 16\]"),
    (dict(index_q=zeros(T, 0, E), index_weights=zeros(T, 0)), r"index_q must have a head at least, got \[9, 0, 16\]"),
    (dict(workspace_bytes=0), r"workspace_bytes must be positive, got 0"),
    (dict(workspace_bytes=-1), r"workspace_bytes must be positive, got -1"),
    (dict(index_k=torch.zeros(S, E, device="meta")), r"index_k must be on cpu like q, got meta"),
    (dict(lse=torch.zeros(T, H, device="meta")), r"lse must be on cpu like q, got meta"),
    (dict(key_end=torch.zeros(T, dtype=torch.int32, device="meta")), r"key_end must be on cpu .*, got meta"),
]


@pytest.mark.parametrize("change, message", VALUE_ERRORS)
def test_values(change, message):
    with pytest.raises(ValueError, match=f"^indexer_kl: .*{message}"):
        indexer_kl(**(arguments() | change))


@pytest.mark.parametrize("name", ["q", "k", "index_q", "index_k", "index_weights", "key_start", "key_end"])
def test_what_is_no_tensor(name):
    for value, kind in ((None, "NoneType"), ([[1.0]], "list")):
        with pytest.raises(TypeError, match=f"^indexer_kl: {name} must be a tensor, got {kind}"):
            indexer_kl(**(arguments() | {name: value}))
    for wrong, message in (
        (dict(workspace_bytes=1e6), "an integer, got 1000000.0"),
        (dict(softmax_scale="x"), "a number"),
    ):
        with pytest.raises(TypeError, match=f"^indexer_kl: {next(iter(wrong))} must be {message}"):
            indexer_kl(**(arguments() | wrong))
    with pytest.raises(TypeError, match="^warmup_attention: v must be a tensor, got NoneType"):
        warmup_attention(v=None, **{name: x for name, x in arguments().items() if name != "lse"})


@pytest.mark.parametrize("name", ["index_q", "index_k", "index_weights"])
def test_transforms_that_would_find_no_gradient(name):
    given = arguments()
    x = given.pop(name)

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        return indexer_kl(**given, **{name: leaf}).loss

    refused = f"^indexer_kl: {name} must be a plain tensor, .* differentiate the loss by backward"
    for transform, given_x in ((torch.func.grad, x), (torch.func.vmap, torch.stack([x, x])), (torch.func.jacfwd, x)):
        with pytest.raises(ValueError, match=refused):
            transform(loss)(given_x)
    with forward_ad.dual_level(), pytest.raises(ValueError, match=refused):
        loss(forward_ad.make_dual(x, torch.ones_like(x)))
    assert loss(x) > 0


@pytest.mark.parametrize("name", ["q", "k", "lse", "token_weight"])
def test_constants_that_require_grad(name):
    given = arguments()
    given[name].requires_grad_()
    with pytest.raises(
        ValueError, match=rf"^indexer_kl: {name} is a constant but requires grad; detach: the main model"
    ):
        indexer_kl(**given)


@pytest.mark.parametrize("name", ["k", "index_q", "index_k", "index_weights", "lse", "token_weight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_mixed_dtypes(name, dtype):
    given = arguments()
    given[name] = given[name].to(dtype)
    with pytest.raises(
        TypeError, match=rf"^indexer_kl: {name} must be torch.float32 like q, got {dtype}; .*throughout"
    ):
        indexer_kl(**given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_dtypes_that_the_cpu_does_not_take(dtype):
    given = arguments()
    given = {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in given.items()}
    with pytest.raises(
        TypeError, match=rf"^indexer_kl: q must be float32 or float64 on the CPU, got {dtype}; .*q.float"
    ):
        indexer_kl(**given)


def test_dtypes_of_accelerators():
    """The meta device follows the accelerators' rule once q is bfloat16: vectors bfloat16, the rest float32."""
    given = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in arguments().items()}
    low = {name: given[name].bfloat16() for name in ("q", "k", "index_q", "index_k")}
    assert indexer_kl(**(given | low)).loss.dtype == torch.float32
    for name, x in low.items():
        if name != "q":
            with pytest.raises(TypeError, match=rf"{name} must be torch.bfloat16 on meta, got torch.float32"):
                indexer_kl(**(given | low | {name: x.float()}))
    for name in ("index_weights", "lse", "token_weight"):
        with pytest.raises(TypeError, match=rf"{name} must be torch.float32 on meta, got torch.bfloat16"):
            indexer_kl(**(given | low | {name: given[name].bfloat16()}))


@pytest.mark.parametrize("name", ["key_start", "key_end"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_dtype_of_intervals(name, dtype):
    given = arguments()
    given[name] = given[name].to(dtype)
    with pytest.raises(TypeError, match=rf"^indexer_kl: {name} must be int32, got {dtype}; use {name}\.int\(\)"):
        indexer_kl(**given)


@pytest.mark.parametrize(
    "name, position, value, message",
    [
        ("key_start", 0, -1, "key_start must not be negative; query 0 has key_start=-1"),
        ("key_start", 7, 0, "key_start must be non-decreasing; query 7"),
        ("key_start", 8, 20, "key_end must be at least key_start .*; query 8 has key_start=20, key_end=9"),
        ("key_end", 3, 1, "key_end must be non-decreasing; query 3"),
        ("key_end", 8, 10, "key_end must be at most S = 9; query 8 has key_start=6, key_end=10"),
    ],
)
def test_contents_of_intervals(name, position, value, message):
    given = arguments()
    given[name][position] = value
    with pytest.raises(ValueError, match=message):
        indexer_kl(**given)


SCORES_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(index_q=zeros(T, E)), ValueError, r"index_q must be \[T, I, E\], got \[9, 16\]"),
    (dict(index_k=zeros(E)), ValueError, r"index_k must be \[S, E\], got \[16\]"),
    (dict(index_k=zeros(S, E - 1)), ValueError, r"index_k must be \[S, E\] = \[\*, 16\], got \[9, 15\]"),
    (dict(index_weights=zeros(I, T)), ValueError, r"index_weights must be \[T, I\] = \[9, 4\], got \[4, 9\]"),
    (dict(index_weights=zeros(T, I).double()), TypeError, r"index_weights must be torch.float32 like index_q, got"),
    (
        dict(index_q=zeros(T, I, E).half()),
        TypeError,
        r"index_q must be float32 or float64 on the CPU, got torch.float16",
    ),
    (dict(key_start=zeros(T, dtype=torch.int64)), TypeError, r"key_start must be int32, got torch.int64"),
    (dict(key_end=zeros(T + 1, dtype=torch.int32)), ValueError, r"key_end must be \[T\] = \[9\], got \[10\]"),
]


@pytest.mark.parametrize("change, error, message", SCORES_ERRORS)
def test_indexer_scores(change, error, message):
    given = arguments()
    names = ("index_q", "index_k", "index_weights", "key_start", "key_end")
    with pytest.raises(error, match=f"^indexer_scores: {message}"):
        indexer_scores(**({name: given[name] for name in names} | change))


@pytest.mark.parametrize(
    "name, position, value", [("key_start", 7, 0), ("key_end", 3, 1), ("key_end", 8, 10), ("key_start", 0, -1)]
)
def test_indexer_scores_contents_of_intervals(name, position, value):
    given = arguments()
    given[name][position] = value
    names = ("index_q", "index_k", "index_weights", "key_start", "key_end")
    with pytest.raises(ValueError, match=f"check_intervals: {name} must"):
        indexer_scores(*(given[name] for name in names))
