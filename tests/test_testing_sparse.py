"""testing.sparse: the baseline passes its own ruler, and what commonly goes wrong does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import Selection, select_keys
from flash_indexer.testing import SHAPES, Inputs, assert_close, make_inputs
from flash_indexer.testing.sparse import (
    SparseResult,
    eager_dsa,
    make_values,
    reference_dsa,
    selection_mask,
)

DTYPES = [torch.float32, torch.bfloat16]


def problem(
    shape: str, dtype: torch.dtype, V: int = 6, topk: int = 9
) -> tuple[Inputs, Tensor | None, Tensor, dict[str, Any]]:
    x = make_inputs(SHAPES[shape], seed=1, dtype=dtype)
    wide = [y.double() for y in (x.index_q, x.index_k, x.index_weights)]
    selection = select_keys(*wide, key_start=x.key_start, key_end=x.key_end, topk=topk)
    d_out = torch.randn(*x.q.shape[:2], abs(V), generator=torch.Generator().manual_seed(2)).to(dtype)
    v = None if V < 0 else make_values(x, V, seed=3)
    options = dict(d_out=d_out, value_dim=-V if V < 0 else None, token_weight=x.token_weight, d_loss=0.7)
    return x, v, selection_mask(selection, len(x.k)), options


def rejected(got: SparseResult, truth: SparseResult, eager: SparseResult) -> list[str]:
    names = []
    for name, *tensors in zip(SparseResult._fields, got, truth, eager, strict=True):
        try:
            if tensors[1] is not None:
                assert_close(name, *tensors)
        except AssertionError:
            names.append(name)
    return names


@pytest.mark.parametrize("V", [6, -8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accepts_the_baseline(shape: str, dtype: torch.dtype, V: int) -> None:
    x, v, selected, options = problem(shape, dtype, V)
    truth, eager = reference_dsa(x, v, selected, **options), eager_dsa(x, v, selected, **options)
    assert rejected(eager, truth, eager) == []
    for name, got, ref in zip(SparseResult._fields, eager, truth, strict=True):
        if ref is None:
            assert got is None
            continue
        finite = ref.isfinite()
        distance = (got[finite] - ref[finite]).norm() / ref[finite].norm()
        assert distance < (2e-2 if dtype == torch.bfloat16 else 1e-5), name
        assert got.dtype == (torch.float32 if name in ("lse", "loss", "kl", "d_index_weights") else dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_what_goes_wrong(dtype: torch.dtype) -> None:
    x, v, selected, options = problem("smollm2", dtype)
    truth, eager = reference_dsa(x, v, selected, **options), eager_dsa(x, v, selected, **options)
    dense = torch.ones_like(selected).tril()
    assert {"out", "lse", "kl", "dq", "dk", "dv"} <= {*rejected(eager_dsa(x, v, dense, **options), truth, eager)}
    one_key_less = selected.clone()
    one_key_less[40, selected[40].nonzero()[3]] = False
    assert {"out", "lse", "dq"} <= {*rejected(eager_dsa(x, v, one_key_less, **options), truth, eager)}
    base_two = eager._replace(lse=eager.lse / 0.6931471805599453)
    assert rejected(base_two, truth, eager) == ["lse"]
    for name in ("dq", "dk", "dv", "d_index_q", "d_index_k", "d_index_weights"):
        row = getattr(eager, name).clone()
        row[20] = 0.0
        assert rejected(eager._replace(**{name: row}), truth, eager) == [name]


def test_the_mask_of_a_selection() -> None:
    """Slots behind the count and indices out of range are none."""
    indices = torch.tensor([[0, 2, 1], [3, 9, -1], [1, 2, 3]], dtype=torch.int32)
    selection = Selection(indices, torch.tensor([2, 3, 0], dtype=torch.int32), torch.zeros(3, 3))
    assert selection_mask(selection, 4).int().tolist() == [[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_the_baseline_is_for_low_precision() -> None:
    x, v, selected, options = problem("one_head", torch.float64)
    with pytest.raises(TypeError, match="eager_dsa: inputs must be bfloat16, float16 or float32, got float64"):
        eager_dsa(x, v, selected, **options)
