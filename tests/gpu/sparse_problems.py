"""What the tests of the sparse stage on GPUs share: results held to float64 of the selection that was made."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flash_indexer.ops import Selection
from flash_indexer.testing import Inputs, assert_close
from flash_indexer.testing.sparse import eager_dsa, reference_dsa, selection_mask


def hold_to_float64(
    got: Mapping[str, Tensor | None], selection: Selection, x: Inputs, v: Tensor | None, d_out: Tensor, d_loss: float,
    *, weighted: bool = True,
) -> None:  # fmt: skip
    """`got`: results by their names in `reference_dsa`, of which None must have none there."""
    selected = selection_mask(selection, len(x.k))
    weight = x.token_weight if weighted else None
    options = dict(d_out=d_out, value_dim=d_out.shape[2] if v is None else None, token_weight=weight, d_loss=d_loss)
    truth, eager = reference_dsa(x, v, selected, **options), eager_dsa(x, v, selected, **options)
    for name, value in got.items():
        if value is None:
            assert getattr(truth, name) is None
            continue
        tensors = value, getattr(truth, name), getattr(eager, name)
        if name == "dq":  # of a query with one key: 0, and only the backward of a softmax has no rounding there
            alone = selection.count <= 1
            assert value[alone].numel() == 0 or value[alone].abs().max() <= 1e-5 * value.abs().max()
            tensors = tuple(y[~alone] for y in tensors)
        if value.dtype.itemsize == 4:  # no row has a rounding of its output that its few numbers could hide behind
            tensors = tuple(y.flatten() for y in tensors)
        assert_close(name, *tensors)
