"""Queries by sample: which of a sequence's tokens the loss is computed of in one step.

    loss = sum over drawn t of KL[t] / (n · fraction)        an unbiased estimate of the mean KL over all n tokens

since every token is drawn with probability `fraction`, whatever is drawn beside it. Dividing by the number of those
drawn would be biased where that number varies.

Tokens are drawn in blocks of neighbours, whose keys are nearly the same ones: one block from each of as many runs of
equal length as there are blocks to draw, so that early and late queries, which see few and many keys, are drawn alike
in every step. Processes that share a sequence get equal shares where each of its pieces (2·cp of zigzag) holds whole
runs: 1 / fraction is a whole number, and the blocks to draw are a multiple of the pieces. Elsewhere a piece has its
share but for less than two blocks, so that a process may have no query at all where pieces are more than blocks.
"""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

BLOCK = 128
"""Tokens of a block, the queries of one score tile of the kernels."""

FEWEST = 4
"""Blocks to draw from a sequence; where there would be fewer, blocks are halved."""


def check_fraction(op: str, fraction: float) -> None:
    """Raises ValueError unless 0 < fraction <= 1."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{op}: queries must be above 0 and at most 1 (all of them), got {fraction}")


def draw_queries(length: int, fraction: float, *, seed: int, draw: str) -> Tensor:
    """The tokens of one sequence whose loss is computed: int64 [R], ascending.

    Every token is among them with probability `fraction`. As many blocks are drawn as make up the fraction; where that
    is no whole number, the one below or above, by chance. A function of its arguments: the same ones give the same
    tokens, on any machine.

    Args:
        length: tokens of the sequence. draw: a name for this draw, a new one for every sequence and step.

    Raises:
        ValueError: for a fraction that is not above 0 and at most 1.
    """
    check_fraction("draw_queries", fraction)
    if fraction == 1:
        return torch.arange(length)
    size = block_tokens(length, fraction)
    number = int.from_bytes(sha256(f"queries {seed} {draw}".encode()).digest()[:4])
    generator = torch.Generator().manual_seed(number)
    chosen = draw_blocks(-(-length // size), fraction, generator)
    tokens = (chosen[:, None] * size + torch.arange(size)).flatten()
    return tokens[tokens < length]


def block_tokens(length: int, fraction: float) -> int:
    """Tokens of a block: 128, halved until at least 4 blocks are to be drawn from the sequence."""
    size = BLOCK
    while size > 1 and length * fraction < FEWEST * size:
        size //= 2
    return size


def fewer_blocks_than_pieces(length: int, fraction: float, pieces: int) -> str | None:
    """What to say where processes share a sequence in so many pieces that some may have no query to compute."""
    blocks = length * fraction / block_tokens(length, fraction)
    if fraction == 1 or pieces == 1 or blocks >= pieces:
        return None
    return (
        f"--queries {fraction:g} draws {blocks:.0f} blocks of a sequence of {length:,} tokens, which is cut into "
        f"{pieces} pieces: some processes have more queries than others in a step, or none, and wait; longer "
        "sequences, more queries or a smaller --cp share them evenly"
    )


def draw_blocks(blocks: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Each of `blocks` with probability `fraction`: int64, ascending, one from each of as many runs of equal length.

    Where the blocks don't divide into runs of equal length, the ring of all blocks is cut into runs at a random place:
    so each block is equally often in a short one.
    """
    expected = blocks * fraction
    count = int(expected)
    chance, *places = torch.rand(2 + blocks, dtype=torch.float64, generator=generator).tolist()
    count += chance < expected - count
    turn = int(places.pop() * blocks) if count and blocks % count else 0
    bounds = [n * blocks // count for n in range(count + 1)] if count else []
    chosen = [begin + int(place * (end - begin)) for place, begin, end in zip(places, bounds, bounds[1:], strict=False)]
    return torch.tensor(sorted((block + turn) % blocks for block in chosen), dtype=torch.int64)
