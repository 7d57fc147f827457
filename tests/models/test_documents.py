"""Every form of document boundaries gives the loss of the documents apart; forms that disagree are refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel

from flash_indexer import reference
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach
from flash_indexer.models.documents import DOCUMENT_INPUTS, document_positions
from flash_indexer.parallel.mesh import Parallel

Tiny = Callable[..., PreTrainedModel]
LENGTHS = (5, 1, 9)
FORMS: dict[str, dict[str, Tensor | int]] = {
    "position_ids": dict(position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None]),
    "position_ids from 2": dict(position_ids=torch.cat([torch.arange(n) + 2 for n in LENGTHS])[None]),
    "document mask": dict(attention_mask=torch.tensor([[1] * 5 + [2] + [3] * 9])),
    "document mask, falling": dict(attention_mask=torch.tensor([[7] * 5 + [1] + [4] * 9], dtype=torch.int32)),
    "seq_idx": dict(seq_idx=torch.tensor([[0] * 5 + [1] + [2] * 9], dtype=torch.int32)),
    "cu_seq_lens": dict(
        cu_seq_lens_q=torch.tensor([0, 5, 6, 15], dtype=torch.int32),
        cu_seq_lens_k=torch.tensor([0, 5, 6, 15], dtype=torch.int32), max_length_q=9, max_length_k=9,
    ),
    "cu_seq_lens_q, an empty document": dict(cu_seq_lens_q=torch.tensor([0, 5, 5, 6, 15, 15])),
}  # fmt: skip


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 61, (1, n), generator=generator) for n in LENGTHS]


def attached(model: PreTrainedModel) -> IndexerHandle:
    handle = attach(model, num_heads=3, head_dim=32)
    generator = torch.Generator().manual_seed(5)
    for parameter in handle.indexers.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return handle


def apart(handle: IndexerHandle) -> dict[int, float]:
    """Each layer's mean KL, by the definition in float64, of documents that were run one by one."""
    sums: dict[int, float] = dict.fromkeys(handle.layers, 0.0)

    def add(capture: LayerCapture) -> None:
        tensors = (capture.q, capture.k, capture.index_q, capture.index_k, capture.index_weights)
        _, kl = reference.indexer_kl(
            *(x.double() for x in tensors), softmax_scale=capture.softmax_scale, key_start=capture.key_start,
            key_end=capture.key_end,
        )  # fmt: skip
        sums[capture.layer] += float(kl.sum())

    with handle.using(add), torch.no_grad():
        for ids in documents():
            handle.decoder(input_ids=ids, use_cache=False)
    return {layer: total / sum(LENGTHS) for layer, total in sums.items()}


@pytest.mark.parametrize("family_name", ["llama", "deepseek_v3"])
def test_every_form_gives_the_loss_of_the_documents_apart(tiny: Tiny, family_name: str) -> None:
    handle = attached(tiny(family_name))
    want, ids = apart(handle), torch.cat(documents(), 1)
    with torch.no_grad():
        handle.model(ids, use_cache=False)
    joined = {layer: float(loss.kl) for layer, loss in handle.losses().items()}
    for name, inputs in FORMS.items():
        with torch.no_grad():
            handle.model(ids, use_cache=False, **inputs)
        for layer, loss in handle.losses().items():
            assert float(loss.kl) == pytest.approx(want[layer], rel=1e-4), name
            assert abs(joined[layer] - want[layer]) > 0.02 * want[layer]


def test_every_form_gives_the_same_positions_and_two_that_agree_are_taken() -> None:
    tokens, want = torch.zeros(1, 15, dtype=torch.long), FORMS["position_ids"]["position_ids"]
    for first, second in itertools.product(FORMS.values(), repeat=2):
        got = document_positions(first | second, tokens)
        assert torch.equal(got - got[0, 0], want)


def test_rows_begin_documents() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    for inputs, want in (
        ({}, [[0, 1, 2], [0, 1, 2]]),
        (dict(attention_mask=torch.ones(2, 3)), [[0, 1, 2], [0, 1, 2]]),
        (dict(attention_mask=torch.tensor([[1, 1, 1], [2, 2, 3]])), [[0, 1, 2], [0, 1, 0]]),
        (dict(seq_idx=torch.tensor([[0, 0, 0], [0, 0, 1]])), [[0, 1, 2], [0, 1, 0]]),
        (dict(cu_seq_lens_k=torch.tensor([0, 3, 5, 6])), [[0, 1, 2], [0, 1, 0]]),
        (dict(position_ids=torch.tensor([[4, 5, 6]])), [[4, 5, 6], [4, 5, 6]]),
    ):
        assert document_positions(inputs, tokens).tolist() == want


def test_arguments_may_be_positional(tiny: Tiny) -> None:
    handle, ids = attached(tiny("llama")), torch.cat(documents(), 1)
    with torch.no_grad():
        handle.decoder(ids, FORMS["document mask"]["attention_mask"], use_cache=False)
    assert [float(x.kl) for x in handle.losses().values()] == pytest.approx(list(apart(handle).values()), rel=1e-4)


MASK = FORMS["document mask"]["attention_mask"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            dict(attention_mask=MASK, position_ids=torch.arange(15)[None]),
            "position_ids and attention_mask must begin documents at the same .* differ at token 5 of row 0; leave one",
        ),
        (
            dict(attention_mask=MASK, cu_seq_lens_q=torch.tensor([0, 7, 15])),
            "attention_mask and cu_seq_lens_q must begin documents at the same tokens, but differ at token 5 of row 0",
        ),
        (
            dict(cu_seq_lens_q=torch.tensor([0, 5, 15]), cu_seq_lens_k=torch.tensor([0, 6, 15])),
            "cu_seq_lens_q and cu_seq_lens_k must begin documents at the same tokens",
        ),
        (dict(attention_mask=MASK - 1), "attention_mask must be all ones, document numbers from 1, or absent"),
        (dict(attention_mask=MASK[:, :9]), r"attention_mask must be \[B, L\] = \[1, 15\], got \[1, 9\]"),
        (dict(seq_idx=MASK[0]), r"seq_idx must be \[B, L\] = \[1, 15\], got \[15\]"),
        (dict(cu_seq_lens_q=torch.tensor([0, 9])), r"must rise from 0 to the batch's B \* L = 15 tokens, got \[0, 9\]"),
        (dict(cu_seq_lens_q=torch.tensor([0, 9, 5, 15])), r"must rise from 0 .* got \[0, 9, 5, 15\]"),
        (dict(cu_seqlens_q=torch.tensor([0, 15])), "cu_seqlens_q is no form of document boundaries that is read"),
        (dict(document_ids=MASK), "document_ids is no form of document boundaries that is read, got Tensor; pass"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused(tiny: Tiny, inputs: dict[str, Any], message: str) -> None:
    handle, ids = attached(tiny("llama")), torch.cat(documents(), 1)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        handle.model(ids, use_cache=False, **inputs)


def test_a_document_that_goes_on_in_the_next_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"boundary at each of the 2 rows' first tokens, got none at \[3\]"):
        document_positions(dict(cu_seq_lens_q=torch.tensor([0, 2, 6])), torch.zeros(2, 3, dtype=torch.long))


def test_parts_of_a_sequence_say_their_documents_by_positions_alone() -> None:
    inputs = dict(position_ids=torch.arange(15)[None], attention_mask=MASK)
    with pytest.raises(ValueError, match=r"needs position_ids and no other form, got \['attention_mask'\]; pass this"):
        document_positions(inputs, torch.zeros(1, 15, dtype=torch.long), Parallel(cp=2))


def test_the_names_are_those_of_transformers_collator() -> None:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([dict(input_ids=x[0]) for x in documents()])
    assert set(batch) - {"input_ids", "labels"} <= set(DOCUMENT_INPUTS)
    assert torch.equal(document_positions(batch, batch["input_ids"]), FORMS["position_ids"]["position_ids"])


def test_positions_of_several_axes_are_read_by_the_text_s() -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    text, image = torch.tensor([0, 1, 2, 0, 1, 2]).expand(2, 6), torch.tensor([0, 1, 1, 1, 1, 2]).expand(3, 2, 6)
    assert torch.equal(document_positions(dict(position_ids=torch.cat((text[None], image))), ids), text)
    alone = torch.arange(6).expand(2, 6)
    assert torch.equal(document_positions(dict(position_ids=image), ids), alone)
    with pytest.raises(ValueError, match=r"position_ids \[B, L\] or \[1, L\], got \[2, 6\] and \[5, 2, 6\]"):
        document_positions(dict(position_ids=text.expand(5, 2, 6)), ids)
