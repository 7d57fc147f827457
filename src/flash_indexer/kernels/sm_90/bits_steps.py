"""What the kernels of dense tiles with bits share: where a CTA's queries lie, and how a tile's bits come."""

import tilelang.language as T

from flash_indexer.kernels.sm_90.macros import number

__all__ = ["QueryTile", "copy_bits"]


class QueryTile:
    """The 128 queries of a head that stay in CTA bx. The last queries come first: they have the most tiles of keys.

    To be made by each branch of the CTA for itself, for its numbers are registers. head, first: the head and the first
    query. count: of the tiles of keys that hold a bit.
    """

    def __init__(self, LIST, bx, H, row_tiles, tiles):
        tile = row_tiles - 1 - bx // H
        self._list, self._at = LIST, _number(tile * (tiles + 1))
        self.head, self.first = _number(bx % H), _number(tile * 128)
        self.count = _number(number(LIST, self._at))

    def keys(self, i, N):
        """The first key of the i-th of these tiles of N."""
        return number(self._list, self._at + 1 + i) * N


@T.macro
def copy_bits(BITS, Bs, stage, lines, begin):
    """The words of a tile, 128 of each of so many lines, into a stage, which is (full, i) as in `commit`.

    begin: (line, words of a line, column). Tuples, for numbers become variables of the macro, between which and the
    copies before TileLang elects a thread once more.
    """
    for j in list(range(lines)):
        T.tma_copy(
            BITS[(begin[0] + j) * begin[1] + begin[2] : (begin[0] + j) * begin[1] + begin[2] + 128],
            Bs[stage[1] * (lines * 128) + j * 128 : stage[1] * (lines * 128) + j * 128 + 128],
            barrier=stage[0][stage[1]],
        )  # fmt: skip


def _number(value):
    """Computed here, and read wherever it is used."""
    return T.alloc_var("int32", value)[0]
