"""Every kernel compiled to machine code: no spills, no serialised wgmma, and as many instructions as its sizes ask for.

Counts are of instructions in the code, not of executions. A kernel of which the compiler deleted or serialised a part
still lowers, and may still be right: here is where it shows.
"""

from __future__ import annotations

import re

import pytest

from flash_indexer.kernels import catalog
from flash_indexer.kernels.sm_90 import sizes

pytestmark = pytest.mark.slow
KERNELS = list(catalog.every_kernel())
LAUNCH_REGISTERS = 168  # 65,536 / 384 threads: what setmaxnreg starts from
EXPONENTIALS = 64  # of one thread for a 128 x 128 tile
MOST_REGISTERS = {
    "rows": 72, "rows_warp": 96, "sparse_rows": 64, "select": 40, "sparse_index_largest": 64, "sparse_index_table": 64,
    "sparse_index_finish": 64, "sparse_scatter": 64, "gradients_reduce": 128, "finish": 64, "scale": 64,
    "sparse_delta": 64, "sparse_exact_table": 64, "sparse_exact_grid": 64, "sparse_exact_finish": 64,
    "quantize": 96, "quantize_index": 96, "quantize_keys": 128, "bits": 64, "bits_keys": 64,
    "bits_lists": 64, "bits_numbers": 64, "bits_slots": 64,
}  # fmt: skip
MANY = 3  # sizes of a kernel, of which every fourth is inspected by CI where there are more
LATENT = ("attention_mla", "sparse_attention_mla")
SELECTED = ("sparse_index_gradients", "sparse_index_scores")
GATHERED = ("sparse_gradients_mla", *SELECTED)  # no tile comes by the copy engine
NARROW = ("score_narrow", "score_narrow_fp8")
# what is under way when they hand a stage back is of another stage, or has an address made of what was loaded
OTHERS_UNDER_WAY = (
    "attention", "gradients_query", "gradients_key", "head_gradients_query", "head_gradients_key",
    "bits_gradients_query", "sparse_gradients_mla",
)  # fmt: skip
BITS = ("bits_attention", "bits_gradients_query", "bits_gradients_key")
HEADS = (
    "attention", *BITS, *LATENT, "head_gradients_query", "head_gradients_key", "head_gradients_once",
    "sparse_gradients_mla",
)  # fmt: skip
# bytes that producers spill, who have 24 or 40 registers and wait for memory anyway, or that are used once an item
MOST_SPILLED = {
    "attention": 500, "head_gradients_query": 64, "head_gradients_key": 1200, "sparse_gradients_mla": 500,
    "kl_gradients": 40,
}  # fmt: skip


def sampled() -> list[object]:
    """Every kernel; of one with many sizes most are marked `every_size`."""
    found: list[object] = []
    for name in catalog.names():
        kernels = [kernel for kernel in KERNELS if kernel[0] == name]
        for n, kernel in enumerate(kernels):
            left = len(kernels) > MANY and n % 4 > 0
            found.append(pytest.param(kernel, marks=pytest.mark.every_size if left else (), id=title(kernel)))
    return found


def title(kernel: tuple[str, tuple[tuple[str, int], ...]]) -> str:
    name, static = kernel
    return "-".join([name, *(f"{size}{value}" for size, value in static)])


def leaves_masks(name: str, static: dict[str, int]) -> bool:
    return name == "score_narrow" and "left" in static and static["mode"] == sizes.RELU


def most_spilled(name: str, static: dict[str, int]) -> int:
    """Bytes; numbers of an item are put aside where a tile's masks are made."""
    return 40 if leaves_masks(name, static) else MOST_SPILLED.get(name, 0)


def products(name: str, static: dict[str, int]) -> int:
    """Steps of 16 along the reduced dimension, for the copies of each product that the unrolled loops hold."""
    if name == "score":
        return 4 * static["D"] // 16
    if name == "score_narrow":  # with masks for two heads
        return (2 if leaves_masks(name, static) else 1) * static["D"] // 16
    if name == "score_narrow_fp8":  # of 32 columns, for two heads
        return 2 * static["E"] // 32
    if name == "lse":
        return 3 * static["D"] // 16
    if name in ("score_fp8", "lse_fp8"):  # of 32 columns
        return (4 if name == "score_fp8" else 3) * static["D"] // 32
    if name in ("gradients_query", "gradients_key"):
        return (4 * static["E"] + 5 * 128) // 16
    if name == "gradients_key_masked":  # two key tiles of a pair by halves of 64, in steps of two and of one
        return 3 * 2 * 128 // 16
    if name == "kl_gradients":  # for each part
        return sizes.kl_parts(static["E"]) * 128 // 16
    if name == "attention":  # logits before all items, of masked and whole tiles, beside the last; values but before
        return 4 * (static["D"] + static["E"]) // 16 + (3 * static["BN"] // 16 if static["V"] else 0)
    if name in LATENT:
        return 3 * (36 + 4 + 4)
    if name == "sparse_gradients_mla" and static["half"]:  # the same; of dk 4 steps for a panel, which dS and P have
        return 2 * (36 + 32 + 2 * 4) + 8 + 4
    if name == "sparse_gradients_mla":  # two warpgroups' S, dP and dq with its rope; a panel of dk, and its rope
        return 2 * (18 + 16 + 2 * 4) + 16 + 8
    if name == "sparse_index_gradients":  # S and O of the queries' warps; S and the sums of the keys'
        return 2 * static["E"] // 16 + 128 // 16 + 64 // 16
    if name == "sparse_index_scores":
        return static["E"] // 16
    if name in ("head_gradients_query", "head_gradients_key"):
        return 3 * (static["D"] + static["E"]) // 16 + 3 * static["N"] // 16
    if name == "bits_attention":
        return 2 * static["D"] // 16 + 2 * static["N"] // 16
    if name == "bits_gradients_query":
        return 4 * static["D"] // 16 + 2 * static["N"] // 16
    if name == "bits_gradients_key":
        return 2 * static["D"] // 16 + 2 * static["N"] // 16
    if name == "head_gradients_once":
        return 3 * (static["D"] + static["E"]) // 16 + 3 * 2 * 128 // 16
    return 0


def test_an_arrival_depends_on_the_loads_that_it_follows(machine):
    """An arrival in the other thread block overtakes loads that wait behind additions to memory, so the one that gives
    the inbox back has an address made of what was loaded, in both warpgroups that attend.
    """
    code = machine("sparse_gradients_mla", exact=0, half=0).listing
    assert len(re.findall(r"SYNCS\.ARRIVE\.TRANS64\.RED\S* RZ, \[R\d+", code)) == 2


def test_loads_under_way_are_found(machine):
    """Where an arrival is known to have some: of another stage than the one that it gives back."""
    code = machine("gradients_query", E=64, IP=8, masks=1)
    assert code.read() == sum(code.opcodes.values()) > 1000, "every one is read"
    assert code.loads_under_way() != []


@pytest.mark.parametrize("kernel", sampled())
def test_machine_code(kernel, machine):
    name, static = kernel[0], dict(kernel[1])
    code = machine(name, **static)
    assert code.complaints == ()
    assert code.spilled <= most_spilled(name, static)
    if most_spilled(name, static) == 0:
        assert code.stack == 0
    assert code.count("QGMMA" if name.endswith("_fp8") else "HGMMA") == products(name, static)
    if name not in OTHERS_UNDER_WAY:
        assert code.loads_under_way() == []
    if name == "kl_gradients":  # of 640 threads; tiles that are wholly seen and others, of a warp's tokens
        assert code.registers == 96 and code.count("USETMAXREG") == 3 and code.count("UTMALDG") > 0
        assert code.count("FENCE.VIEW.ASYNC") == 3  # of barriers; where scores go back, of two kinds of tiles
        tokens = sizes.kl_parts(static["E"]) * 128 // static["IP"]
        assert code.count("MUFU.EX2") == 2 * 4 * max(tokens // sizes.KL_ROW_WARPS, 1)
        return
    if name in MOST_REGISTERS:
        assert 8 <= code.registers <= MOST_REGISTERS[name]
        return
    assert code.registers == (LAUNCH_REGISTERS if name not in (*SELECTED, *NARROW) else 128)  # of 512 threads
    assert (code.count("UTMALDG") > 0) == (name not in (*GATHERED, "gradients_key_masked"))  # copies of whole runs
    assert code.count("USETMAXREG") == (3 if name in (*LATENT, *SELECTED) else 2)
    if name in SELECTED:
        return
    if name in HEADS:
        assert code.count("MUFU.EX2") > 0
        return
    turns = name == "lse_fp8" or (name == "score_fp8" and static["D"] == 576)
    stored = name == "score_narrow" and static["D"] >= 64  # by way of keys that the whole warpgroup is done with
    assert (code.count("BAR.SYNC") > 1) == (turns or stored), (
        "one after the barriers' initialisation, turns where they are taken, and before a tile is stored"
    )
    exponentials = code.count("MUFU.EX2")
    if name.startswith("lse") or name == "score_fp8" or static.get("mode") == sizes.EXP:
        copies = 1 if name in NARROW else 4
        assert copies * EXPONENTIALS <= exponentials <= (copies + 2) * EXPONENTIALS
    else:
        assert exponentials in ((EXPONENTIALS, 2 * EXPONENTIALS) if leaves_masks(name, static) else (0,))
