"""What a selection of keys is, and when it is one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """The keys of each query in ascending order, their number, and their scores.

    indices: int32 [T, K], -1 behind the last. count: int32 [T]. scores: [T, K], -inf behind the last; NaN in the whole
    row of a query that sees a score that is NaN. Behind the first `count` slots nothing is read.
    """

    indices: Tensor
    count: Tensor  # type: ignore[assignment]
    scores: Tensor

    def rows(self, rows: slice) -> Selection:
        """The selection of some of the queries: views."""
        return Selection(self.indices[rows], self.count[rows], self.scores[rows])


def check_selection(selection: Selection, num_keys: int) -> None:
    """Checks 0 <= count <= K and 0 <= indices[t,0] < ... < indices[t,count-1] < S. Reads the contents: synchronises.

    Args:
        selection: indices [T, K] and count [T], integers.
        num_keys: S.

    Raises:
        TypeError: for what is no selection.
        ValueError: naming the first query that breaks a rule, with its value.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"check_selection: selection must be a Selection, got {type(selection).__name__}")
    indices, count = selection.indices, selection.count
    if indices.ndim != 2 or count.shape != indices.shape[:1]:
        raise ValueError(
            f"check_selection: indices and count must be [T, K] and [T], got {list(indices.shape)} and "
            f"{list(count.shape)}"
        )
    K = indices.shape[1]
    wrong_count = (count < 0) | (count > K)
    if bool(wrong_count.any()):
        t = int(wrong_count.int().argmax())
        raise ValueError(f"check_selection: count must be from 0 to K = {K}; query {t} has count={int(count[t])}")
    present = torch.arange(K, device=count.device) < count[:, None]
    rules = (
        ((indices < 0) | (indices >= num_keys), f"indices must be from 0 to S - 1 = {num_keys - 1}", 0),
        (indices[:, 1:] <= indices[:, :-1], "indices must ascend, each key once", 1),
    )
    for broken, rule, offset in rules:
        broken = broken & present[:, offset:]
        if bool(broken.any()):
            t, slot = broken.nonzero()[0].tolist()
            row = indices[t, : slot + offset + 1].tolist()
            raise ValueError(
                f"check_selection: {rule}, in a query's first `count` slots; query {t} has "
                f"{', '.join(map(str, row[-2:]))} at slot {slot + offset}; sort each row, drop its duplicates and put "
                "-1 behind, or take the selection from select_keys"
            )
