"""judge.teacher_check: the sums of a teacher's probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_indexer.judge.teacher_check import teacher_errors
from flash_indexer.models.attach import IndexerHandle


def test_a_teacher_that_is_not_finite_is_not_called_right(
    handle: IndexerHandle, batches: list[dict[str, Tensor]]
) -> None:
    assert max(teacher_errors(handle, batches[0]).values()) < 1e-5
    with torch.no_grad():
        handle.decoder.layers[0].self_attn.q_proj.weight[0, 0] = math.nan
    assert math.isnan(teacher_errors(handle, batches[0])[0])
