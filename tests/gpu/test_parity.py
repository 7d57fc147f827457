"""`indexer_kl` on the GPU against float64, for every shape class, layout and target, judged by the ruler."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace

import pytest
import torch

from flash_indexer.ops import bodies, launch
from flash_indexer.ops.bodies import TORCH
from flash_indexer.testing import KERNEL_CLASSES, KernelClass, Result, assert_close, reference_indexer_kl

pytestmark = pytest.mark.gpu
LAYOUTS = ("causal", "documents", "window", "cached_prefix", "fewer_keys", "arbitrary", "long", "short")
TARGETS = ("mean", "mean with lse", "sum_logits")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", KERNEL_CLASSES, ids=lambda sizes: "D{}-E{}-IP{}".format(*sizes))
def test_against_float64(sizes, layout, target, problem, measure, baseline, request):
    name = request.node.name
    x = problem(name, sizes, layout)
    if target == "sum_logits":  # a sum over heads spreads as one head's logits do
        x = replace(x, softmax_scale=x.softmax_scale * x.q.shape[1] ** -0.5)
    rng = random.Random(zlib.crc32(name.encode()) + 1)
    weight = rng.choice((None, x.token_weight))
    common = dict(target=target.split()[0], token_weight=weight, d_loss=rng.choice((1.0, rng.uniform(-3, 3))))
    lse = x.lse if target == "mean with lse" else None
    workspace = rng.choice((2**29, 2**29, 2**20, 1))
    got = measure(x, lse=lse, workspace_bytes=workspace, **common)
    truth = reference_indexer_kl(x, **common)
    eager = baseline(x, truth, lse=lse, **common)
    torch.cuda.synchronize()
    sizes_drawn = dict(q=list(x.q.shape), k=list(x.k.shape), index_q=list(x.index_q.shape), workspace=workspace)
    print(sizes_drawn, common["d_loss"], "weights" if weight is not None else "no weights")
    check(got, truth, eager)
    seen = x.key_end > x.key_start
    used = seen.double() / seen.sum().clamp_min(1) if weight is None else weight.double()
    terms = used * got.kl.double()
    assert abs(got.loss.item() - terms.sum().item()) <= 1e-6 * terms.abs().sum().item()


@pytest.mark.parametrize("target", ["mean", "sum_logits"])
@pytest.mark.parametrize("nothing", ["seen", "keys", "queries"])
def test_no_query_sees_a_key(nothing, target, problem, measure):
    x = problem("empty", KERNEL_CLASSES[0], "documents")
    if nothing == "seen":
        x = replace(x, key_end=x.key_start)
    elif nothing == "keys":
        x = replace(x, k=x.k[:0], index_k=x.index_k[:0], key_start=0 * x.key_start, key_end=0 * x.key_end)
    else:
        cut = {name: getattr(x, name)[:0] for name in ("q", "index_q", "index_weights", "key_start", "key_end")}
        x = replace(x, **cut)
    got = measure(x, target=target)
    assert all((value == 0).all() for value in got)
    assert got.d_index_k.shape == x.index_k.shape and got.kl.shape == x.key_start.shape


@pytest.mark.parametrize("inputs", ["strided", "unaligned"])
def test_any_layout_in_memory(inputs, problem, measure):
    x = problem("strides", KERNEL_CLASSES[3], "documents")
    names = ("q", "k", "index_q", "index_k", "index_weights", "lse", "token_weight", "key_start", "key_end")
    move = {"strided": lambda y: torch.stack([y, y], -1)[..., 0], "unaligned": shifted}[inputs]
    other = replace(x, **{name: move(getattr(x, name)) for name in names})
    expected = measure(x, lse=x.lse, token_weight=x.token_weight)
    got = measure(other, lse=other.lse, token_weight=other.token_weight)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values, beginning one element after an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


OTHER_SIZES = {  # sizes that no kernel takes, and why
    "D": (KernelClass(80, 64, 8), "mean", r"q must have D in \{64, 96, 128, 192, 256, 576\} on CUDA, got D=80"),
    "E": (KernelClass(64, 24, 8), "mean", r"index_q must have E in \{32, 64, 128\} on CUDA, got E=24"),
    "I": (KernelClass(64, 32, 8), "sum_logits", r"index_q must have 1 to 64 heads \(I\) on CUDA, got I=70"),
    "H": (KernelClass(64, 32, 8), "mean", r"q must have 1 to 128 heads \(H\) on CUDA, got H=130"),
    "per_head": (KernelClass(576, 64, 8), "per_head", r"q must have D of 1 to 256 .* got D=576"),
}


@pytest.mark.parametrize("case", OTHER_SIZES)
def test_other_sizes_run_in_torch_and_say_why(case, problem, measure, baseline, monkeypatch):
    """Forward and backward, without asking for any kernel."""
    monkeypatch.setattr(launch, "load", lambda name, **_: pytest.fail(f"kernel {name}"))
    monkeypatch.setattr(bodies, "_said", set())
    sizes, target, reason = OTHER_SIZES[case]
    heads = {"I": dict(I=70), "H": dict(H=130, G=2), "per_head": dict(H=8, G=1, I=8)}.get(case, {})
    x = problem(f"other {case}", sizes, "documents", **heads)
    options = dict(target=target, token_weight=x.token_weight, d_loss=1.7)
    with pytest.warns(UserWarning, match=f"torch body .* {reason}"):
        got = measure(x, **options)
    truth = reference_indexer_kl(x, **options)
    check(got, truth, baseline(x, truth, **options))


@pytest.mark.parametrize("target", ["mean with lse", "sum_logits", "per_head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_torch_body_on_a_gpu(layout, target, problem, measure, baseline):
    """The same suite in the kernels' place: bfloat16 inputs, float32 arithmetic, chunks of a small workspace."""
    heads = dict(H=4, G=2, I=4) if target == "per_head" else dict(H=6, G=2, I=5)
    x = problem(f"torch {layout} {target}", KernelClass(64, 32, 8), layout, **heads)
    lse = x.lse if target != "sum_logits" else None
    common = dict(target=target.split()[0], token_weight=x.token_weight, d_loss=-0.8)
    with bodies.use(TORCH):
        got = measure(x, lse=lse, workspace_bytes=2**20, **common)
    truth = reference_indexer_kl(x, **common)
    check(got, truth, baseline(x, truth, lse=lse, **common))


def check(got, truth, eager):
    for field, *tensors in list(zip(Result._fields, got, truth, eager, strict=True))[1:]:
        assert_close(field, *tensors)
