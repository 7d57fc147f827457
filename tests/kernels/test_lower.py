"""Each kernel family lowered to CUDA source: what must be in it for Hopper, and what must not (needs no compiler)."""

from __future__ import annotations

import re

import pytest

from flash_indexer.kernels import cache as kernels
from flash_indexer.kernels.sm_90 import gradients, lse, score
from flash_indexer.kernels.sm_90 import sizes as tiles

STREAMED = [
    ("score", dict(D=32, mode=1)),
    ("score", dict(D=64, mode=0)),
    ("score", dict(D=96, mode=0)),
    ("score", dict(D=576, mode=2)),
    ("lse", dict(D=64)),
    ("lse", dict(D=576)),
    ("gradients_query", dict(E=32, IP=8)),
    ("gradients_query", dict(E=128, IP=64)),
    ("gradients_key", dict(E=64, IP=16)),
    ("gradients_key", dict(E=128, IP=32)),
    ("attention", dict(D=128, V=128, E=64, HG=64, **tiles.attention(128, 128, 64, 64))),
    ("attention", dict(D=64, V=64, E=0, HG=3, **tiles.attention(64, 64, 0, 3))),
    ("attention", dict(D=256, V=256, E=64, HG=8, **tiles.attention(256, 256, 64, 8))),
    ("attention", dict(D=128, V=0, E=64, HG=64, **tiles.attention(128, 0, 64, 64))),
    ("attention", dict(D=256, V=0, E=64, HG=5, **tiles.attention(256, 0, 64, 5))),
    ("attention_mla", dict()),
    ("head_gradients_query", dict(D=128, E=64, HG=64, **tiles.head_gradients_query(128, 64))),
    ("head_gradients_query", dict(D=128, E=128, HG=1, **tiles.head_gradients_query(128, 128))),
    ("head_gradients_key", dict(D=128, E=64, HG=64, **tiles.head_gradients_key(128, 64))),
    ("head_gradients_key", dict(D=64, E=32, HG=3, **tiles.head_gradients_key(64, 32))),
    ("head_gradients_once", dict(D=128, E=64, HG=64)),
    ("head_gradients_once", dict(D=64, E=32, HG=3)),
]
ROWWISE = [
    ("rows", dict(logits=0)),
    ("rows", dict(logits=1)),
    ("gradients_reduce", dict(E=64)),
    ("finish", dict(E=128)),
    ("scale", dict()),
]


def title(value: object) -> str:
    return value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items())


def barriers(name: str, static: dict[str, int]) -> int:
    """A full and an empty one for each slot of the rings."""
    if name == "attention":
        return 2 * (static["QS"] + 2 + 2)  # without values, theirs stay unused
    if name == "attention_mla":
        return 2 + 18 + 4 + 2  # queries; panels of two key tiles, handed back in halves; P of either warpgroup
    if name == "head_gradients_once":
        return 2 * (1 + 2 + 2 + 2 + 2)  # queries, index_q with its item, keys, index_k, P
    if name.startswith("head_gradients"):
        return 2 * (static["XS"] + 2 + static["Y2S"])
    if name.startswith("gradients"):
        return 2 * (gradients.X_STAGES + gradients.Y_STAGES[static["E"]])
    return 2 * sum({"score": score, "lse": lse}[name].STAGES[static["D"]])


def test_the_lists_name_every_family():
    assert {name for name, _ in STREAMED + ROWWISE} == set(kernels.BUILDERS)


@pytest.mark.parametrize("name, static", STREAMED, ids=title)
def test_tensor_cores_are_fed_by_the_copy_engine(name, static, source):
    text = source(name, **static)
    body = text[text.index("__global__") :]
    assert "tl::tma_load(" in body
    if name == "attention":  # by calls of wgmma.cuh: logits before the items, in both kinds of steps and of their ends
        assert body.count("at_logits<") >= 4 and "wgmma_ss<" in text
        assert body.count("at_values<") >= 3 if static["V"] else "at_values<" not in body
    elif name == "head_gradients_once":  # logits of the first tile and both kinds of steps; the others later
        assert [body.count(f"ho_{part}<") for part in ("logits", "rows", "keys", "add")] == [3, 3, 3, 3]
        assert "wgmma_ss<" in text
    else:
        assert "tl::wgmma_ss<" in body
    assert len(re.findall(r"\.init\(\d+\);", body)) == barriers(name, static)
    rows = {"head_gradients_key": static.get("N"), "head_gradients_once": 128, "attention": 128}.get(name)
    cleared = rows is not None and rows % static["HG"] != 0  # rows that no copy reaches
    assert body.count("__syncthreads()") == 1 + cleared, "after the barriers are initialised: the rings hold no other"
    assert body.index("__syncthreads()") < body.index("tl::tma_load(")
    assert len(re.findall(r"tl::warpgroup_reg_(?:alloc|dealloc)<", body)) == (3 if name == "attention_mla" else 2)
    assert "__launch_bounds__(384, 1)" in text
    assert "wait_wgmma<" in body and "mma_sync" not in body


@pytest.mark.parametrize("V", [0, 128])
def test_without_values_the_output_is_the_entropy(V, source):
    """And no value is copied, packed or stored; with values nothing of the entropy is computed."""
    text = source("attention", D=128, V=V, E=64, HG=64, **tiles.attention(128, V, 64, 64))
    body = text[text.index('extern "C" __global__') :]
    entropy = int(V == 0)
    assert f"at_finish<64, 64, {entropy}>" in body and f"at_finish<64, 64, {1 - entropy}>" not in body
    assert f"at_softmax<64, 64, {entropy}, true>" in body or f"at_softmax<48, 64, {entropy}, true>" in body
    for mark in ("VAL_desc", "at_pack<", "at_scale<", "tl::tma_store("):
        assert (mark in body) == (V > 0), mark
    assert ("float* __restrict__ OUT" in body) == (V == 0)


@pytest.mark.parametrize("name, static", STREAMED + ROWWISE, ids=title)
def test_nothing_is_atomic_but_what_says_so(name, static, source):
    text = source(name, **static)
    found = re.findall(r"\batomic\w*\(|AtomicAdd|tma_store_add|\bred\.[\w.]*", text)
    assert set(found) == ({"red.relaxed.gpu.global.add.v4.f32"} if name == "head_gradients_once" else set())


@pytest.mark.parametrize("name, static", ROWWISE, ids=title)
def test_row_kernels_need_no_tensor_cores(name, static, source):
    text = source(name, **static)
    assert "wgmma_ss<" not in text and "tl::tma_load(" not in text
