"""Four processes joined by gloo, and the ruler for what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash_indexer.testing import Result, Shape, assert_close, eager_indexer_kl, make_inputs, reference_indexer_kl


@pytest.fixture(scope="session")
def ranks(start_ranks: Callable[..., Any]) -> Any:
    return start_ranks("gloo", 4)


@pytest.fixture(scope="session")
def judge() -> Callable[..., None]:
    return compare


def compare(
    got: Result, shape: Shape, *, seed: int, dtype: torch.dtype, d_loss: float, lse: bool, weighted: bool,
    target: str = "mean",
) -> None:  # fmt: skip
    """float32 by the ruler, float64 to 1e-10, both against the definition of the whole problem in float64."""
    x = make_inputs(shape, seed=seed, dtype=dtype)
    common = dict(target=target, token_weight=x.token_weight if weighted else None, d_loss=d_loss)
    truth = reference_indexer_kl(x, **common)
    if dtype == torch.float64:
        for value, expected in zip(got, truth, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13)
        return
    eager = eager_indexer_kl(x, lse=x.lse if lse else None, **common)
    for name, *values in list(zip(Result._fields, got, truth, eager, strict=True))[1:]:
        assert_close(name, *values)
    seen = x.key_end > x.key_start
    terms = got.kl.double() * (x.token_weight.double() if weighted else seen / seen.sum())
    assert abs(float(got.loss) - float(terms.sum())) <= 1e-6 * float(terms.abs().sum())
