"""`indexer_kl` in e4m3 on the GPU: the quantising kernels bit by bit, values and gradients by the ruler."""

from __future__ import annotations

import random
import warnings
import zlib
from dataclasses import replace

import pytest
import torch
from fp8_problems import truth, worst_eager

from flash_indexer import causal_intervals, indexer_kl, quantize
from flash_indexer.kernels.sm_90.sizes import HEAD_WIDTHS, INDEX_WIDTHS, SHARED_KEY_SCALES
from flash_indexer.ops import launch
from flash_indexer.ops.kl import gpu_body
from flash_indexer.ops.kl.gpu_fp8 import Fp8Index
from flash_indexer.ops.kl.plan import plan
from flash_indexer.ops.kl.plan_sizes import PlanSizes
from flash_indexer.ops.quantization import Quantized, dequantize
from flash_indexer.ops.quantization_gpu import quantize_index, quantize_keys, quantize_rows
from flash_indexer.testing import KERNEL_CLASSES, KernelClass, Result, assert_close

pytestmark = pytest.mark.gpu
LAYOUTS = ("causal", "documents", "window", "cached_prefix", "fewer_keys", "arbitrary", "short")
KINDS = (("fp8", "fp8"), ("fp8_unrotated", None), (None, "fp8"), (None, "fp8_unrotated"))


def rows(n, *shape, seed=0):
    """Of every magnitude, with zeros, NaN and infinity."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(n, *shape, device="cuda", generator=generator)
    x = (x * torch.logspace(-32, 32, n, device="cuda").view(-1, *[1] * len(shape))).bfloat16()
    x[5], x[6, ..., 3], x[7, ..., 4] = 0, torch.nan, -torch.inf
    return x


def same_numbers(got, expected):
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan], expected[~nan])


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("width", (*HEAD_WIDTHS, 512))
def test_rows_have_the_bits_that_torch_gives_them(width, rotation):
    x = rows(1003, 3, width)
    expected, got = quantize(x.cpu(), rotation=rotation), quantize_rows(x, rotation=rotation)
    same_numbers(got.values.float().cpu(), expected.values.float())
    same_numbers(got.quantized.scale.cpu(), expected.scale)
    by_head = quantize_rows(x, rotation=rotation, by_head=True)
    assert torch.equal(by_head.values.view(torch.uint8), got.values.view(torch.uint8))
    scale = by_head.scale.view(3, 1024)
    same_numbers(scale[:, :1003].T.cpu(), expected.scale)
    assert (scale[:, 1003:] == 0).all()


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("width", INDEX_WIDTHS)
@pytest.mark.parametrize("keys", [1003, 256])
def test_an_indexers_rows_have_the_bits_that_torch_gives_them(keys, width, rotation):
    index_q, index_k, weights = rows(517, 5, width, seed=1), rows(keys, width, seed=2), torch.randn(517, 5).cuda()
    q, k = (quantize(x.cpu(), rotation=rotation) for x in (index_q, index_k))
    got = quantize_index(index_q, index_k, weights, rotation)
    for values, expected in ((got.q, q), (got.k, k)):
        same_numbers(values.float().cpu(), expected.values.float())
    same_numbers(got.half_weights.cpu(), (weights.cpu() * q.scale / 2).view(-1))
    same_numbers(got.k_scale[:keys].cpu(), k.scale)
    assert got.k_scale.shape == (-(-keys // 128) * 128,) and (got.k_scale[keys:] == 0).all()


def keys(S, G, D, seed=0):
    """Within a tile rows differ in size by up to 16, but tile 2 of head 1, whose rows differ by more; zeros, NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(S, G, D, device="cuda", generator=generator)
    x *= 2.0 ** torch.randint(-1, 2, (S, G, 1), device="cuda", generator=generator)
    x[5], x[300, 1], x[17, 0, 3], x[64, 1, 2] = 0, 1e6 * x[300, 1], torch.nan, -torch.inf
    return x.bfloat16()


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("S", [1003, 384, 301])
@pytest.mark.parametrize("width", SHARED_KEY_SCALES)
def test_keys_share_a_scale_where_theirs_are_near(width, S, rotation):
    x, G = keys(S, 3, width), 3
    expected = quantize(x.cpu(), rotation=rotation)
    values, scale = quantize_keys(x, None, rotation=rotation)
    scale, tiles = scale.view(G, -1).cpu(), -(-S // 128)
    shared = (scale.view(G, tiles, 128) < 0).all(-1)
    assert shared.tolist() == [[(g, n) != (1, 2) for n in range(tiles)] for g in range(G)]
    assert (scale.view(G, tiles, 128)[shared] == scale.view(G, tiles, 128)[shared][:, :1]).all()
    got = values.cpu().float() * scale.T[:S, :, None].abs()
    right = dequantize(expected, torch.float32)
    same_numbers(got[256:384, 1], right[256:384, 1])
    assert scale.isfinite().all(), "a row of NaN in a tile leaves the others"
    assert torch.equal(got.isnan(), right.isnan())
    lost = (got - right).abs().nan_to_num()
    assert (lost <= 2.0**-10 * scale.T[:S, :, None].abs().nan_to_num(1.0)).all(), "half of e4m3's smallest number"
    assert (lost <= 2.0**-13 * right.abs().amax(-1, keepdim=True).nan_to_num(1.0)).all()
    assert 0 < (lost > 0).float().mean() < 0.01


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("width", SHARED_KEY_SCALES)
def test_keys_that_are_handed_over_share_the_same_scales(width, rotation):
    """Which are those of rotated rows where these are handed over: the kernel rotates none of them."""
    x = keys(1003, 3, width, seed=1)
    expected, row = quantize_keys(x, None, rotation=rotation), quantize(x, rotation=rotation)
    got = quantize_keys(row.values, row.scale, rotation=rotation)
    assert torch.equal(got[0].view(torch.uint8), expected[0].view(torch.uint8))
    same_numbers(got[1], expected[1])
    alike = quantize_keys(row.values, torch.full_like(row.scale, 0.3))  # no power of two, but one for all
    assert (alike[1] == torch.tensor(-0.3)).all() and torch.equal(
        alike[0].view(torch.uint8), row.values.view(torch.uint8)
    )
    signs = row.scale * torch.tensor([1.0, -1.0, 0.0], device="cuda").repeat(335)[:1003, None]
    values, scale = quantize_keys(row.values, signs)
    found, wanted = values.float() * scale.view(3, 1024).T[:1003, :, None].abs(), row.values.float() * signs[..., None]
    assert torch.equal(found.isnan(), wanted.isnan())
    assert ((found - wanted).abs().nan_to_num() <= 2.0**-13 * wanted.abs().amax(-1, keepdim=True).nan_to_num()).all()
    apart = quantize_keys(row.values, torch.rand_like(row.scale) + 0.5)
    assert (apart[1].view(3, 1024)[:, :1003] > 0).all() and (apart[1].view(3, 1024)[:, 1003:] == 0).all()


def test_keys_of_any_size_beside_each_other(problem):
    """Tiles whose keys keep their own scales, by the ruler: a row 2^12 times as large as its neighbours."""
    x = problem("sizes of keys", KernelClass(192, 64, 32), "documents", H=6, G=3)
    k = x.k.clone()
    k[::97] *= 2.0**-12
    judge("sizes of keys", replace(x, k=k), ("fp8", "fp8"), with_lse=False)


@pytest.mark.parametrize("lengths", [(3000,), (900, 129, 1, 640), (385,)], ids=str)
@pytest.mark.parametrize(("E", "heads"), [(128, 64), (128, 5), (64, 33), (64, 8), (32, 16), (32, 1)])
def test_index_scores_of_small_integers_are_exact(E, heads, lengths):
    """Every tile, of other numbers each time: a stage that is read too early or too late shows."""
    T, generator = sum(lengths), torch.Generator("cuda").manual_seed(E + heads)
    start, end = causal_intervals(torch.tensor([0, *lengths]).cumsum(0).cuda())
    work = plan(
        start, end, PlanSizes(T, E, gpu_body.padded_heads(heads), False, 2**25, launch.processors(start.device))
    )
    assert len(work.chunks) > 1 or T < 3000

    def integers(largest, *shape):
        return torch.randint(-largest, largest + 1, shape, device="cuda", generator=generator)

    for _ in range(20):
        index_q, index_k, weights = integers(4, T, heads, E), integers(4, T, E), integers(8, T, heads)
        index = Fp8Index((index_q.bfloat16(), index_k.bfloat16(), weights.float()), "fp8_unrotated")
        expected = torch.zeros(-(-T // 128) * 128, -(-T // 128) * 128, device="cuda")
        for head in range(heads):
            products = index_q[:, head].float() @ index_k.float().T
            expected[:T, :T] += weights[:, head, None] * products.relu()
        expected = expected.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)
        for chunk in work.chunks:
            out = torch.full((chunk.tiles, 128, 128), torch.nan, device="cuda")
            index.scores(chunk, out.view(-1, 128))
            token, key, tile, _ = chunk.score.view(-1, 4).long().T
            assert torch.equal(out[tile], expected[token // 128, key // 128])


def call(x, *, weight, d_loss, **options):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the torch body says why it runs
        result = indexer_kl(x.q, x.k, *leaves, **fixed, token_weight=weight, **options)
        (d_loss * result.loss).backward()
    return Result(*(value.detach() for value in result), *(leaf.grad for leaf in leaves))


def judge(name, x, kind, *, with_lse, workspace_bytes=2**29):
    rng = random.Random(zlib.crc32(name.encode()) + 1)
    weight, d_loss = rng.choice((None, x.token_weight)), rng.choice((1.0, rng.uniform(-3, 3)))
    options = dict(index_dtype=kind[0], teacher_dtype=kind[1])
    got = call(
        x, weight=weight, d_loss=d_loss, lse=x.lse if with_lse else None, workspace_bytes=workspace_bytes, **options
    )
    right = truth(x, *kind, weight, d_loss)
    eager = worst_eager(x, right, weight=weight, d_loss=d_loss, lse=x.lse if with_lse else None, **options)
    for field, *tensors in list(zip(Result._fields, got, right, eager, strict=True))[1:]:
        assert_close(field, *tensors)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", KERNEL_CLASSES, ids=lambda sizes: "D{}-E{}-IP{}".format(*sizes))
def test_against_float64(sizes, layout, kind, problem, request):
    name = request.node.name
    rng = random.Random(zlib.crc32(name.encode()))
    G = rng.choice((1, 1, 2, 3))
    x = problem(name, sizes, layout, H=G * rng.randint(1, 3), G=G)
    judge(name, x, kind, with_lse=False, workspace_bytes=rng.choice((2**29, 2**20, 1)))


@pytest.mark.parametrize(("H", "G", "D"), [(128, 1, 576), (16, 16, 192), (64, 1, 128), (32, 8, 128)])
def test_sizes_of_real_models(H, G, D, problem):
    x = problem(f"real {H} {G} {D}", KernelClass(D, 128, 64), "causal", H=H, G=G, I=64)
    judge(f"real {H} {G} {D}", x, ("fp8", "fp8"), with_lse=False)


def test_a_given_lse_is_read(problem):
    x = problem("lse", KernelClass(128, 64, 16), "documents", H=6, G=2)
    q, k = (dequantize(quantize(t.cpu(), rotation=True), torch.float64).cuda() for t in (x.q, x.k))
    wide = replace(x, q=q, k=k)
    from flash_indexer.reference import teacher_lse

    own = teacher_lse(wide.q, wide.k, x.softmax_scale, x.key_start, x.key_end).float()
    judge("lse", replace(x, lse=own), ("fp8", "fp8"), with_lse=True)


@pytest.mark.parametrize("kind", ["fp8", "fp8_unrotated"])
@pytest.mark.parametrize("width", [96, 192])
def test_a_teacher_that_is_handed_over_gives_the_same_bits(width, kind, problem):
    x = problem("handed over", KernelClass(width, 64, 32), "documents", H=6, G=3)
    options = dict(weight=x.token_weight, d_loss=1.0, lse=x.lse, index_dtype="fp8", teacher_dtype=kind)
    expected = call(x, **options)
    q, k = (quantize(t.cpu(), rotation=kind == "fp8") for t in (x.q, x.k))
    q, k = (Quantized(t.values.cuda(), t.scale.cuda()) for t in (q, k))
    given = call(replace(x, q=q, k=k), **options)
    for a, b in zip(given, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("workspace", [1, 2**21])
def test_the_workspace_and_the_run_change_no_bits_of_rows(workspace, problem):
    x = problem("workspace", KernelClass(576, 128, 64), "causal", H=8, G=1)
    options = dict(weight=None, d_loss=1.0, index_dtype="fp8", teacher_dtype="fp8")
    whole, again, small = (call(x, workspace_bytes=n, **options) for n in (2**29, 2**29, workspace))
    for field in Result._fields:
        assert torch.equal(getattr(whole, field), getattr(again, field)), field
    for field in ("kl", "entropy", "d_index_q", "d_index_weights"):
        assert torch.equal(getattr(whole, field), getattr(small, field)), field


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("workspace", [2**29, 2**21])
def test_index_scores_beside_the_quantising_have_the_same_bits(workspace, filled, problem, monkeypatch):
    """Also where torch fills new memory, which it does on the stream that the memory is taken on."""
    x = problem("beside", KernelClass(192, 128, 64), "causal", H=6, G=3)
    options = dict(
        weight=None, d_loss=1.0, lse=x.lse, index_dtype="fp8", teacher_dtype="fp8", workspace_bytes=workspace
    )
    monkeypatch.setattr(Fp8Index, "share", lambda self, chunk, traffic, processors: processors)
    expected = call(x, **options)
    torch.use_deterministic_algorithms(filled, warn_only=True)
    try:
        for share in (1, 40, 131) * 5:
            monkeypatch.setattr(Fp8Index, "share", lambda *_, share=share: share)
            for field, a, b in zip(Result._fields, call(x, **options), expected, strict=True):
                assert torch.equal(a, b), field
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["fp8", "fp8_unrotated"])
@pytest.mark.parametrize("target", ["per_head", "sum_logits"])
def test_other_targets_multiply_the_rounded_tensors(target, kind, problem):
    heads = dict(H=4, G=2, I=4) if target == "per_head" else dict(H=6, G=2, I=5)
    x = problem(f"fp8 {target}", KernelClass(64, 64, 8), "documents", **heads)
    options = dict(weight=x.token_weight, d_loss=1.0, target=target)
    got = call(x, index_dtype="fp8_unrotated", teacher_dtype=kind, **options)
    rotated = {"q": kind == "fp8", "k": kind == "fp8", "index_q": False, "index_k": False}
    named = {n: quantize(getattr(x, n).cpu(), rotation=rotation) for n, rotation in rotated.items()}
    wide = replace(x, **{n: dequantize(row, torch.bfloat16).cuda() for n, row in named.items()})
    expected = call(wide, **options)
    gradients = ("d_index_q", "d_index_k", "d_index_weights") if target == "per_head" else ()
    for field in ("kl", *gradients):  # other gradients are of the rows as they are
        assert torch.equal(getattr(got, field), getattr(expected, field)), field


def test_nan_stays_visible(problem):
    x = problem("nan", KernelClass(128, 64, 8), "causal", H=4, G=2)
    for name in ("q", "k", "index_q", "index_k"):
        tensor = getattr(x, name).clone()
        tensor[60, ..., 3] = torch.nan
        got = call(replace(x, **{name: tensor}), weight=None, d_loss=1.0, index_dtype="fp8", teacher_dtype="fp8")
        touched = slice(60, 61) if name in ("q", "index_q") else slice(60, None)
        assert got.kl[touched].isnan().all() and got.loss.isnan(), name
        assert got.kl[:60].isfinite().all(), name


@pytest.mark.parametrize("nothing", ["seen", "keys", "queries"])
def test_no_query_sees_a_key(nothing, problem):
    x = problem("empty fp8", KERNEL_CLASSES[0], "documents")
    if nothing == "seen":
        x = replace(x, key_end=x.key_start)
    elif nothing == "keys":
        x = replace(x, k=x.k[:0], index_k=x.index_k[:0], key_start=0 * x.key_start, key_end=0 * x.key_end)
    else:
        x = replace(x, **{n: getattr(x, n)[:0] for n in ("q", "index_q", "index_weights", "key_start", "key_end")})
    got = call(x, weight=None, d_loss=1.0, index_dtype="fp8", teacher_dtype="fp8")
    assert all((value == 0).all() for value in got)
