"""Which sizes are admitted for tiles: the default among them, all within a processor's memory, and all build."""

from __future__ import annotations

import pytest

from flash_indexer.kernels.sm_90 import sizes as tiles
from flash_indexer.ops.attention import layout
from flash_indexer.testing import HEAD_CLASSES

PROCESSOR_BYTES = 227 * 1024  # what a CTA may have on compute capability 9.0
PROBLEMS = [
    (kernel, shape | widths)
    for sizes in HEAD_CLASSES
    for kernel, shape in layout.shapes(*sizes).items()
    for widths in ([{}, {"E": 0}, {"V": 0}] if kernel == "attention" else [{}])
]
TUNED, RAGGED = ([problem for problem in PROBLEMS if problem[1]["HG"] == count] for count in (64, 12))


def title(value):
    return value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items())


EACH = pytest.mark.parametrize("kernel, shape", PROBLEMS, ids=title)


def shared_bytes(kernel, D, E, HG, V=0, BN=0, QS=0, TMA_STORE=0, N=0, XS=0, Y2S=0):
    """What the builders allocate, in bytes, without barriers."""
    if kernel == "attention":
        return 2 * (QS * 128 * (D + E) + 2 * BN * (D + E + V)) + QS * 4 * 520 + 4 * (1024 if V else 1536)
    numbers = 4 * Y2S * 6 * N if kernel == "head_gradients_key" else 0
    return 2 * (XS * 128 * (D + E) + 2 * N * D + Y2S * N * E) + numbers + 4 * XS * 8


@EACH
def test_the_default_comes_first_and_nothing_twice(kernel, shape):
    found = tiles.candidates(kernel, shape)
    assert found[0] == tiles.default(kernel, shape)
    assert all(found.count(sizes) == 1 for sizes in found)
    assert all(sizes.keys() == found[0].keys() and all(type(x) is int for x in sizes.values()) for sizes in found)


@EACH
def test_candidates_fit(kernel, shape):
    for sizes in tiles.candidates(kernel, shape):
        assert shared_bytes(kernel, **shape, **sizes) <= PROCESSOR_BYTES - 8 * 32
        keys = sizes.get("BN", sizes.get("N"))
        accumulators = (1 if shape["E"] == 0 else 2) * keys // 2 + shape.get("V", shape["E"]) // 2
        assert keys % 16 == 0 and accumulators + keys // 4 <= 224, "of 232 or 240 registers"
        if kernel == "head_gradients_key":
            assert keys in (64, 128) and shape["HG"] <= keys
        if sizes.get("TMA_STORE"):
            assert 0 < shape["V"] <= shape["D"] and sizes["QS"] == 2 and 128 % shape["HG"] == 0


def test_there_is_a_choice():
    """For the sizes of the suite mqa64: else there would be nothing to tune."""
    counts = {kernel: len(tiles.candidates(kernel, shape)) for kernel, shape in layout.shapes(128, 128, 64, 64).items()}
    assert counts.keys() == set(tiles.KERNELS) and min(counts.values()) >= 8


@pytest.mark.parametrize("D, E", [(128, 128), (256, 64)])
def test_a_shape_that_the_kernel_does_not_take_has_no_candidates(D, E):
    assert tiles.candidates("head_gradients_key", dict(D=D, E=E, HG=128)) == []
    assert tiles.candidates("head_gradients_key", dict(D=D, E=E, HG=64)) != []


def test_a_size_that_is_not_varied_stays_as_shipped(monkeypatch):
    shape = dict(D=128, V=128, E=64, HG=64)
    shipped = tiles.attention(**shape) | {"NEW": 7}
    monkeypatch.setattr(tiles, "attention", lambda **shape: shipped)
    found = tiles.candidates("attention", shape)
    assert found[0] == shipped and len(found) > 1 and {sizes["NEW"] for sizes in found} == {7}


@pytest.mark.slow
@pytest.mark.parametrize("kernel, shape", [pytest.param(*x, id=title(x[0]) + str(n)) for n, x in enumerate(TUNED)])
def test_the_candidates_farthest_from_the_default_lower(kernel, shape, source):
    found = tiles.candidates(kernel, shape)
    for sizes in (found[-1], max(found, key=lambda sizes: sizes.get("BN", sizes.get("N")))):
        text = source(kernel, **shape, **sizes)
        assert "wgmma" in text and "tl::tma_load(" in text, sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel, static",
    [(kernel, shape | x) for kernel, shape in TUNED for x in tiles.candidates(kernel, shape)],
    ids=title,
)
def test_every_candidate_compiles(kernel, static, machine):
    """One that spills is slow, and loses by itself."""
    assert machine(kernel, **static).count("HGMMA") > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel, static",
    [(kernel, shape | x) for kernel, shape in RAGGED for x in tiles.candidates(kernel, shape)],
    ids=title,
)
def test_every_candidate_of_a_tile_that_is_not_filled_lowers(kernel, static, source):
    assert "wgmma" in source(kernel, **static)
