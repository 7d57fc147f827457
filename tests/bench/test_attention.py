"""The benchmark of the attention alone: its checks and its line (the timing itself needs a GPU)."""

from __future__ import annotations

import pytest
import torch

from flash_indexer.bench import attention as bench_attention
from flash_indexer.bench.timing import Size
from flash_indexer.ops import attention_forward


@pytest.mark.parametrize("size", [Size(4, 2, 16, 0, 0, (20, 13), 12), Size(4, 1, 20, 0, 0, (25,), 16)])
def test_sampled_rows_refuse_a_wrong_result(size):
    tensors, others = bench_attention.problem(size, "cpu", torch.float32)
    out, lse = attention_forward(*tensors, **others)
    bench_attention.check_rows(tensors, others, out, lse)
    for wrong in ((out * 1.01, lse), (out, lse + 1e-3), (out * float("nan"), lse)):
        with pytest.raises(RuntimeError, match="is wrong, so no speed is reported"):
            bench_attention.check_rows(tensors, others, *wrong)


def test_latent_values_are_the_keys():
    (_, k, v), _ = bench_attention.problem(Size(2, 1, 20, 0, 0, (5,), 16), "cpu", torch.float32)
    assert v.data_ptr() == k.data_ptr() and v.shape == (5, 1, 16)


def test_a_line_says_what_was_not_measured():
    record = {"name": "mla", "ours": {"p50": 12.0}, "tflops": 760.0, "matmul_tflops": 790.0}
    beside = {"over_cudnn": 0.8, "cudnn_forward": {"p50": 15.0}, "notes": {}}
    assert bench_attention.line(record | beside).endswith("cuDNN 15.000 ms, 0.80 x")
    absent = {"over_cudnn": None, "notes": {"cudnn": "no kernel for this width"}}
    assert bench_attention.line(record | absent).endswith("no kernel for this width")
