"""The check of the benchmark in e4m3: it lets right results pass, and nothing else, NaN included."""

from __future__ import annotations

import warnings

import pytest
import torch

from flash_indexer import causal_intervals
from flash_indexer.bench import fp8


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 4, 64), (64, 2, 64), (64, 8, 32), (64, 32), (64, 8))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    key_start, key_end = causal_intervals(torch.tensor([0, 64]))
    return tensors, dict(softmax_scale=0.125, key_start=key_start, key_end=key_end, lse=None)


@pytest.fixture(autouse=True)
def without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e4m3 is emulated here
        yield


def test_right_results_pass(problem):
    fp8.check_rows(*problem)


@pytest.mark.parametrize("factor", [1.1, torch.nan])
def test_wrong_values_and_gradients_do_not(problem, monkeypatch, factor):
    right = fp8.indexer_kl

    def wrong_value(*tensors, **options):
        result = right(*tensors, **options)
        return result._replace(kl=result.kl * factor)

    def wrong_gradient(*tensors, **options):
        result = right(*tensors, **options)
        return result._replace(loss=result.loss * factor)

    for wrong in (wrong_value, wrong_gradient):
        monkeypatch.setattr(fp8, "indexer_kl", wrong)
        with pytest.raises(RuntimeError, match="no speed is reported"):
            fp8.check_rows(*problem)
