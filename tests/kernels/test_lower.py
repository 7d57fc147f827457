"""Each kernel lowered to CUDA source: what must be in it for Hopper, and what must not (needs no compiler)."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from flash_indexer.kernels import catalog
from flash_indexer.kernels.sm_90 import sizes

Kernel = catalog.Kernel
ATOMIC = re.compile(r"\batomic\w*\(|AtomicAdd|tma_store_add|\bred\.[\w.]*|\bcp\.reduce\.[\w.:]*")


def samples() -> list[Kernel]:
    """Of every kernel the first and the last of the sizes that it is compiled for; of attention each variant."""
    chosen = {}
    for name, row in sizes.BUILDERS.items():
        variants = {tuple(x[size] > 0 for size in ("E", "V", "TMA_STORE")): x for x in row.compiled if "V" in x}
        chosen[name] = [row.compiled[0], row.compiled[-1], *variants.values()]
    return list(dict.fromkeys(catalog.kernel(name, **static) for name, some in chosen.items() for static in some))


SAMPLES = samples()
FIRST = list({name: kernel for kernel in reversed(SAMPLES) for name in (kernel[0],)}.values())  # of each kernel
LARGE = (
    "attention", "attention_mla", "score_narrow", "score_narrow_fp8", "sparse_attention_mla", "head_gradients_query",
    "head_gradients_key", "head_gradients_once", "bits_gradients_query", "bits_gradients_key",
)  # fmt: skip
"""Lowered within seconds, not within a fraction of one."""
STREAMED = [kernel for kernel in SAMPLES if sizes.BUILDERS[kernel[0]].streamed]
SELECTED = ("sparse_index_gradients", "sparse_index_scores")
GATHERED = ("sparse_gradients_mla", *SELECTED)  # tensor cores that no copy engine feeds
MASKED = "gradients_key_masked"  # fed by copies of whole runs of bytes
OTHERS = [kernel for kernel in SAMPLES if kernel not in STREAMED and kernel[0] not in (*GATHERED, MASKED)]
FLOATS = {"red.relaxed.gpu.global.add.v4.f32"}
BULK = {"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32"}  # of integers, the same in any order
EXACT = {f"red.relaxed.gpu.global.add.{word}" for word in ("u64", "s32")}  # of integers
TABLES = {f"red.{space}.{op}.u32" for space in ("shared", "relaxed.gpu.global") for op in ("add", "max")}
ADDING = {
    "head_gradients_once": FLOATS,
    "gradients_key_masked": {"red.relaxed.gpu.global.add.v2.f32"},  # to each number one thread of a launch
    "sparse_gradients_mla": FLOATS | EXACT,
    "sparse_delta": {"red.relaxed.gpu.global.max.u32"},
    **dict.fromkeys(("sparse_exact_table", "sparse_exact_grid", "sparse_exact_finish"), EXACT | {"red.shared.add.u32"}),
    **dict.fromkeys(SELECTED, FLOATS | BULK),
    **dict.fromkeys(("sparse_index_largest", "sparse_index_table", "sparse_index_finish"), BULK | TABLES),
    "select": {"atomicAdd("},  # of integers
    "bits": {"atomicOr("},  # the same in any order
}


def each(kernels: list[Kernel]) -> pytest.MarkDecorator:
    """One size of each kernel, of the large ones in CI's second step; `make test-all` lowers the other sizes too."""
    marked = []
    for kernel in kernels:
        marks = [pytest.mark.slow] if kernel not in FIRST or kernel[0] in LARGE else []
        marks += [] if kernel in FIRST else [pytest.mark.every_size]
        marked.append(pytest.param(kernel, marks=marks, id=catalog.title(kernel)))
    return pytest.mark.parametrize("kernel", marked)


def device_program(text: str) -> str:
    return text[text.index('extern "C" __global__') :]


def test_the_samples_name_every_kernel():
    assert {name for name, _ in SAMPLES} == set(catalog.names()) and STREAMED and OTHERS


@each(STREAMED)
def test_tensor_cores_are_fed_by_the_copy_engine(kernel, source):
    name, static = kernel[0], dict(kernel[1])
    text = source(name, **static)
    body = device_program(text)
    assert "wgmma_ss<" in text and "wait_wgmma<" in (text if name == "kl_gradients" else body)
    assert "mma_sync" not in body and "ldmatrix" not in body
    declared = set(re.findall(r"(\w+) = reinterpret_cast<Barrier\*>", body))
    assert declared and declared == set(re.findall(r"(\w+)\[\d+\]\.init\(", body)), "every barrier is initialised"
    assert set(re.findall(r"(\w+)\[[^;]*?\]\.wait\(", body)) <= declared
    start, rest = body.split("tl::warpgroup_reg_alloc<", 1)
    cleared = "tl::fence_proxy_async()" in start  # rows that no copy reaches are made zero first
    assert start.count("__syncthreads()") == 1 + cleared, "after the barriers are initialised, and after that"
    assert "__syncthreads()" not in rest, "the rings hold no other"
    assert "tl::tma_load(" in rest and "tl::warpgroup_reg_dealloc<" in rest
    threads = 512 if name.startswith("score_narrow") else 640 if name == "kl_gradients" else 384
    assert f"__launch_bounds__({threads}, 1)" in text


@each([kernel for kernel in SAMPLES if kernel[0] == MASKED])
def test_the_gradient_by_masks_forms_no_logits(kernel, source):
    text = source(kernel[0], **dict(kernel[1]))
    body = device_program(text)
    gradient = text[text.index("struct MaskedRing") : text.index('extern "C" __global__')]
    assert "wgmma_rs<" in gradient and "wgmma_ss<" not in gradient and "copy_bulk(" in gradient
    assert "tl::warpgroup_reg_alloc<" in body and "tl::warpgroup_reg_dealloc<" in body and "tl::tma_load(" not in body
    assert "__syncthreads()" not in body, "the one is in gm_begin"
    assert body.count("__shared__") == 1 and "buf_dyn_shmem" not in body, "no array lies where another one does"
    assert "__launch_bounds__(384, 1)" in text


@pytest.mark.slow
@pytest.mark.parametrize("V", [0, 128])
def test_without_values_the_output_is_the_entropy(V, source):
    """And no value is copied, packed or stored; with values nothing of the entropy is computed."""
    body = device_program(source("attention", D=128, V=V, E=64, HG=64, **sizes.attention(128, V, 64, 64)))
    entropy = int(V == 0)
    assert f"at_finish<64, 64, {entropy}>" in body and f"at_finish<64, 64, {1 - entropy}>" not in body
    assert re.search(rf"at_softmax<\d+, 64, {entropy}, true>", body)
    for mark in ("VAL_desc", "pack_operand<", "at_scale<", "tl::tma_store("):
        assert (mark in body) == (V > 0), mark
    assert ("float* __restrict__ OUT" in body) == (V == 0)


@each(SAMPLES)
def test_nothing_is_atomic_but_what_says_so(kernel, source):
    name, static = kernel[0], dict(kernel[1])
    additions = set(ATOMIC.findall(source(name, **static)))
    assert additions == ADDING.get(name, set())


@each([kernel for kernel in SAMPLES if kernel[0] in GATHERED])
def test_a_kernel_of_one_call_has_nothing_around_it(kernel, source):
    """Its device function sees to barriers, registers and shared memory, which must begin where descriptors say."""
    text = source(kernel[0], **dict(kernel[1]))
    body = device_program(text)
    threads = 512 if kernel[0] in SELECTED else 384
    assert f"__launch_bounds__({threads}, 1)" in text and "extern __shared__ __align__(1024)" in body
    assert body.count(";") == 3, "the prototype, shared memory, the call"
    assert "wgmma_ss<" in text and "__syncthreads" not in body and "fence" not in body


@pytest.mark.parametrize("half", [0, 1])
def test_the_gradients_of_selected_keys_have_the_shared_memory_that_they_lay_out(half, source):
    from flash_indexer.kernels.sm_90.sparse_gradients_mla import SHARED_BYTES

    text = source("sparse_gradients_mla", exact=0, half=half)
    text = text[text.index("namespace sparse_half {" if half else "namespace sparse_pair {") :]
    barriers, behind = re.search(r"BARRIERS = (\d+);\s+constexpr int BYTES = BARRIERS \+ (\d+);", text).groups()
    assert int(barriers) + int(behind) == SHARED_BYTES[half] <= sizes.SHARED_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("E", sizes.GATHERED_INDEX_WIDTHS)
def test_the_indexer_at_selected_keys_has_the_shared_memory_that_it_lays_out(E, source, nvcc, tmp_path):
    """`sizes.sparse_index_bytes` against the layout in its CUDA source, which the compiler evaluates."""
    check = f"sparse_index::Layout<{E}>::BYTES == {sizes.sparse_index_bytes(E)}"
    compiles(source("sparse_index_gradients", E=E, exact=1), (check,), nvcc, tmp_path)
    assert sizes.sparse_index_bytes(E) <= sizes.SHARED_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("shape", sizes.INDEX_HEADS, ids=str)
def test_the_gradient_by_masks_has_the_shared_memory_that_it_lays_out(shape, source, nvcc, tmp_path):
    stage, stages = sizes.masked_stage(**shape), sizes.masked_stages(**shape)
    check = f"MaskedRing<{shape['E']}, {shape['IP']}, {stages}>::BYTES == {stage}"
    compiles(source(MASKED, **shape), (check,), nvcc, tmp_path)
    assert stages >= 4 and stages * stage + 1024 + 20 * stages <= sizes.SHARED_MEMORY + 1024


@pytest.mark.parametrize("shape", sizes.INDEX_HEADS, ids=str)
def test_kl_and_gradients_have_the_registers_and_shared_memory_that_they_ask_for(shape):
    E, IP, warps = shape["E"], shape["IP"], sizes.KL_ROW_WARPS
    multiply, rows, copy = sizes.kl_registers(E, warps)
    threads = sizes.kl_threads(warps)
    assert all(n % 8 == 0 and 24 <= n <= 240 for n in (multiply, rows, copy))
    assert 256 * multiply + 32 * warps * rows + 128 * copy <= 65536 // threads // 8 * 8 * threads
    parts, (stages, score_stages) = sizes.kl_parts(E), sizes.kl_stages(E, IP)
    tokens = parts * 128 // IP
    rings = stages * (256 * E + parts * 2048 + tokens * 256) + score_stages * tokens * 1024
    shares = max(warps // tokens, 1)
    around = 8 * (3 * stages + 2 * score_stages + 2) + tokens * shares * (32 + 16 * (shares > 1))
    assert min(stages, score_stages) >= 3
    assert rings + parts * 256 * E + -(-around // 1024) * 1024 <= sizes.SHARED_MEMORY


@pytest.mark.slow
def test_selection_has_the_shared_memory_and_the_sizes_of_its_source(source, nvcc, tmp_path):
    from flash_indexer.kernels.sm_90.select import SHARED_BYTES

    checks = (
        f"sizeof(selection::Shared) <= {SHARED_BYTES}", f"selection::ROW == {sizes.SELECT_ROW}",
        f"selection::ORDERED == {sizes.SELECT_ORDERED}",
    )  # fmt: skip
    compiles(source("select"), checks, nvcc, tmp_path)
    assert 3 * (SHARED_BYTES + 1024) <= 228 * 1024, "three blocks a multiprocessor"


def compiles(text, checks, nvcc, folder):
    """The program with these assertions, which the compiler evaluates."""
    program = folder / "layout.cu"
    program.write_text(text + "".join(f"static_assert({check});\n" for check in checks), encoding="utf-8")
    includes = [f"-I{os.environ[variable]}" for variable in ("TL_TEMPLATE_PATH", "TL_CUTLASS_PATH")]
    command = [nvcc, "-std=c++20", "-w", "--ptx", "-arch=sm_90a", *includes, "-o", "/dev/null", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@each(OTHERS)
def test_other_kernels_need_no_tensor_cores(kernel, source):
    text = source(kernel[0], **dict(kernel[1]))
    assert "wgmma_ss<" not in text and "tl::tma_load(" not in text
