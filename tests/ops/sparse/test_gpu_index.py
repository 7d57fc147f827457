"""The kernels of selection and learning refuse what they don't take, before they look at the device."""

from __future__ import annotations

import re

import pytest
import torch

from flash_indexer.ops.sparse import gpu_index, gpu_select


def leaves(I: int, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(3, I, E), torch.zeros(5, E), torch.zeros(3, I)


@pytest.mark.parametrize("E", [16, 48, 256])
def test_other_widths_are_refused(E: int) -> None:
    for refusal, widths in ((gpu_index.refusal, "64, 128"), (gpu_select.refusal, "32, 64, 128")):
        assert re.search(rf"E in \[{widths}\], got E={E}; zero-pad", str(refusal(leaves(4, E))))


def test_more_heads_are_refused_where_they_do_not_fit() -> None:
    assert "1 to 64 heads (I) on CUDA, got I=65" in str(gpu_index.refusal(leaves(65, 64)))
    assert gpu_index.refusal(leaves(64, 128)) is None
    assert gpu_select.refusal(leaves(65, 64)) is None
