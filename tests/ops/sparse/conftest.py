"""One sparse problem with its truth and its baseline, for every test of the family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import select_keys
from flash_indexer.ops import Selection
from flash_indexer.testing import SHAPES, Inputs, Shape, assert_close, make_inputs
from flash_indexer.testing.sparse import SparseResult, eager_dsa, make_values, reference_dsa, selection_mask

NAMES = ("q", "k", "v", "index_q", "index_k", "index_weights")
D_LOSS = -1.7


@dataclass(frozen=True)
class Case:
    """Inputs, values (None: the first columns of k), the selection of `topk` keys and an upstream gradient of out."""

    x: Inputs
    v: Tensor | None
    value_dim: int | None
    selection: Selection
    d_out: Tensor
    topk: int
    known: dict[str, tuple[SparseResult, SparseResult | None]] = field(default_factory=dict, init=False)

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x.index_q, self.x.index_k, self.x.index_weights

    @property
    def intervals(self) -> dict[str, Any]:
        return dict(key_start=self.x.key_start, key_end=self.x.key_end)

    def tensors(self, needs: tuple[bool, ...] = (True,) * 6) -> list[Tensor | None]:
        """Fresh leaves: q, k, v, index_q, index_k, index_weights."""
        given = (self.x.q, self.x.k, self.v, *self.index)
        return [
            None if y is None else y.detach().clone().requires_grad_(need) for y, need in zip(given, needs, strict=True)
        ]

    def expected(self, **options: Any) -> tuple[SparseResult, SparseResult | None]:
        """The truth, and the baseline where the inputs are not float64; made once for the same options."""
        key = str({name: y.tolist() if isinstance(y, Tensor) else y for name, y in options.items()})
        if key not in self.known:
            self.known[key] = self._expected(**options)
        return self.known[key]

    def _expected(self, **options: Any) -> tuple[SparseResult, SparseResult | None]:
        selected = selection_mask(self.selection, len(self.x.k))
        options = dict(d_out=self.d_out, value_dim=self.value_dim, d_loss=D_LOSS) | options
        truth = reference_dsa(self.x, self.v, selected, **options)
        wide = self.x.q.dtype == torch.float64
        return truth, None if wide else eager_dsa(self.x, self.v, selected, **options)

    def judge(self, got: dict[str, Tensor | None], **options: Any) -> None:
        """float64 to 1e-10, float32 by the ruler; got: results by the names of SparseResult, any of them."""
        truth, eager = self.expected(**options)
        for name, value in got.items():
            right = getattr(truth, name)
            if value is None or right is None:
                assert value is right, name
            elif eager is None:
                torch.testing.assert_close(
                    value, right, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
                )
            elif name == "loss":
                weight = options.get("token_weight")
                weight = (self.selection.count > 0) / (self.selection.count > 0).sum() if weight is None else weight
                assert abs(float(value) - float(right)) <= 1e-6 * float((weight * truth.kl).abs().sum())
            else:
                assert_close(name, value, right, getattr(eager, name))


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """make_case(shape, dtype=float64, V=5, topk=7, always=(0, 0), seed=0); V negative: the first -V columns of k."""

    def make(
        shape: str | Shape, *, dtype: torch.dtype = torch.float64, V: int = 5, topk: int = 7,
        always: tuple[int, int] = (0, 0), seed: int = 0, **changes: Any,
    ) -> Case:  # fmt: skip
        sizes = replace(SHAPES[shape] if isinstance(shape, str) else shape, **changes)
        x = make_inputs(sizes, seed=seed, dtype=dtype)
        selection = select_keys(
            x.index_q, x.index_k, x.index_weights, key_start=x.key_start, key_end=x.key_end, topk=topk, always=always
        )
        v = None if V < 0 else make_values(x, V, seed=seed + 1)
        generator = torch.Generator().manual_seed(seed + 2)
        d_out = torch.randn(*x.q.shape[:2], abs(V), generator=generator, dtype=torch.float64).to(dtype)
        return Case(x, v, -V if V < 0 else None, selection, d_out, topk)

    return make
