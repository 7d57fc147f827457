"""Which body runs, asked in one place: by device, generation, sizes and what is installed; and what is said of it."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from flash_indexer import indexer_kl
from flash_indexer.ops import bodies
from flash_indexer.ops.bodies import TORCH
from flash_indexer.testing import SHAPES, make_inputs

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(major, minor, tilelang=True): torch believes in one."""
    monkeypatch.setattr(bodies, "_said", set())

    def pretend(major=9, minor=0, tilelang=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(bodies, "_TILELANG_IS_HERE", tilelang)

    return pretend


def no_refusal():
    return None


def test_kernels_run_where_the_gpu_has_them_and_they_take_the_sizes(gpu):
    gpu()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bodies.choose("op", GPU, no_refusal) == "sm_90"
        assert bodies.generation(GPU) == "sm_90" and bodies.no_kernels(GPU) is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_other_device_is_asked_anything(device):
    assert bodies.choose("op", torch.device(device), lambda: pytest.fail("asked")) == TORCH


@pytest.mark.parametrize(
    "machine, refusal, reason",
    [
        (dict(major=8), None, r"for GPUs of compute capability 9.0 \(H100, H200, GH200\), and cuda:0 is of .* 8.0"),
        (dict(major=10), None, "cuda:0 is of compute capability 10.0"),
        (dict(tilelang=False), None, r"tilelang is not installed \(pip install 'flash-indexer\[kernels\]'\)"),
        (dict(), "q must have D in {64, 128} on CUDA, got D=80; zero-pad", "got D=80; zero-pad"),
    ],
)
def test_the_torch_body_runs_elsewhere_and_says_why_once(gpu, machine, refusal, reason):
    gpu(**machine)
    with pytest.warns(UserWarning, match=f"op runs the blockwise torch body .*: .*{reason}"):
        assert bodies.choose("op", GPU, lambda: refusal) == TORCH
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bodies.choose("op", GPU, lambda: refusal) == TORCH


def test_rocm_says_9_0_too_and_has_no_kernels(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "cuda:0 is of ROCm" in bodies.no_kernels(GPU) and bodies.generation(GPU) == TORCH


def test_tensors_may_claim_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bodies.no_kernels(GPU) == "there is no GPU"


def test_a_caller_may_name_the_torch_body(gpu):
    gpu()
    with bodies.use(TORCH):
        assert bodies.choose("op", GPU, no_refusal) == TORCH
        x = make_inputs(SHAPES["packed"], seed=0)
        index = x.index_q, x.index_k, x.index_weights
        got = indexer_kl(x.q, x.k, *index, softmax_scale=0.3, key_start=x.key_start, key_end=x.key_end)
        assert got.loss.isfinite()
    assert bodies.choose("op", GPU, no_refusal) == "sm_90"
    with pytest.raises(ValueError, match="body must be 'torch', got 'sm_80'"), bodies.use("sm_80"):
        pass
