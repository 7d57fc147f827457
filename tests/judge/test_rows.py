"""judge.rows: the block of rows against dense formulas."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flash_indexer.judge.rows import row_block
from flash_indexer.models.attach import IndexerHandle, LayerCapture


def test_row_block_shows_the_longest_document(handle: IndexerHandle, batches: list[dict[str, Tensor]]) -> None:
    """The 40-token document is the batch's second row: tokens 40 to 80."""
    captures: list[LayerCapture] = []
    with torch.no_grad(), handle.using(captures.append):
        handle.model(**batches[0], use_cache=False)
    capture = captures[1]
    block = row_block(capture, rows=6, columns=16)
    assert (block.layer, block.first_query, block.num_keys, block.keys_per_column) == (1, 34, 40, 3)
    logits = torch.einsum("thd,shd->ths", capture.q[74:80], capture.k[40:80].repeat_interleave(3, 1))
    visible = torch.arange(40) <= torch.arange(34, 40)[:, None]
    attention = (logits * capture.softmax_scale).masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)
    relu = torch.einsum("tie,se->tis", capture.index_q[74:80], capture.index_k[40:80]).relu()
    scores = (relu * capture.index_weights[74:80, :, None]).sum(1).masked_fill(~visible, -torch.inf)
    for got, dense in ((block.teacher, attention), (block.indexer, scores.softmax(-1))):
        expected = torch.stack([columns.amax(-1) for columns in dense.split(3, -1)], -1)
        torch.testing.assert_close(torch.tensor(got), expected, rtol=6e-3, atol=1e-6)
    whole = row_block(capture, rows=64)
    assert (whole.first_query, len(whole.teacher), whole.num_keys, whole.keys_per_column) == (0, 40, 40, 1)
    shortest = row_block(replace(capture, key_start=capture.key_end - 1))
    assert len(shortest.teacher) == shortest.num_keys == 1
