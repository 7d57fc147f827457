"""The layout of work lists: which int32 of an item says what. Operators write them, kernels read them.

An item is `ITEM` numbers for the kernels of attention, and `SHORT_ITEM` for the kernels of score tiles; those without a
name are zero. `items.cuh` has the same names for device code (a test compares them).
"""

from __future__ import annotations

from enum import IntEnum

ITEM, SHORT_ITEM = 8, 4
ITEM_BYTES = 4 * ITEM


class RowItem(IntEnum):
    """A tile of query rows and the run of key tiles that it sees: `attention`, `head_gradients_query` and `_once`.

    Key tiles are counted from the right; those before RIGHT and from LEFT on are masked.
    """

    TOKEN = 0
    KEY_HEAD = 1
    FIRST_KEY = 2
    TILES = 3
    RIGHT = 4
    LEFT = 5
    SEEN = 6


class KeyItem(IntEnum):
    """A tile of keys and a run of row tiles, FIRST to END - 1; WHOLE to WHOLE_END - 1 see all of its keys.

    SLOT: where the partial sum is written; negative: it is added to the result itself. `head_gradients_key`.
    """

    KEY_TILE = 0
    FIRST = 1
    END = 2
    WHOLE = 3
    WHOLE_END = 4
    SLOT = 5


class LatentItem(IntEnum):
    """Rows of queries and pairs of key tiles from right to left; LOW to HIGH - 1 every row sees. `attention_mla`."""

    ROW = 0
    FIRST_KEY = 1
    PAIRS = 2
    LOW = 3
    HIGH = 4


class ScoreItem(IntEnum):
    """A tile of scores: its first token, first key, and its number. `score`."""

    TOKEN = 0
    KEY = 1
    TILE = 2


class NarrowItem(IntEnum):
    """64 tokens and TILES (1 to 3) neighbouring score tiles: the first one's first key and number. `score_narrow`."""

    TOKEN = 0
    KEY = 1
    TILE = 2
    TILES = 3


class QueryTilesItem(IntEnum):
    """Some tokens and the key tiles they see; score tile TILE_BASE + key tile. `gradients_query`."""

    TOKEN = 0
    KEY_TILE = 1
    KEY_TILES = 2
    TILE_BASE = 3


class KeyBlocksItem(IntEnum):
    """A key tile and blocks of 128 tokens, BLOCK to BLOCK_END - 1; SLOT as in KeyItem. `gradients_key`.

    `gradients_key_masked`: KEY_TILE is a pair of key tiles, twice that number and the next one, and blocks are quarters
    of blocks, of 32 tokens.
    """

    KEY_TILE = 0
    BLOCK = 1
    BLOCK_END = 2
    SLOT = 3


class Block(IntEnum):
    """A block of 128 tokens: its score tiles are TILE_BASE + key tile, for KEY_TILE to KEY_TILE_END - 1."""

    TILE_BASE = 0
    KEY_TILE = 1
    KEY_TILE_END = 2


class ReduceItem(IntEnum):
    """A key tile and the slots of its partial sums, SLOT to SLOT_END - 1. `gradients_reduce`."""

    KEY_TILE = 0
    SLOT = 1
    SLOT_END = 2
