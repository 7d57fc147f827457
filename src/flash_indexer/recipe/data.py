"""Text -> packed token sequences of one fixed length, with document boundaries kept as position ids.

`load_documents` reads a user's text, `standard_library_documents` the text that every Python installation has,
`pack` turns either into a `PackedDataset`, whose `summary` says how far it goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flash_indexer.recipe.standard_library import standard_library_documents
from flash_indexer.recipe.text_files import load_documents, read_documents

__all__ = [
    "DataSummary",
    "PackedDataset",
    "check_token_ids",
    "describe",
    "embedding_rows",
    "length_warning",
    "load_documents",
    "longest_context",
    "pack",
    "standard_library_documents",
    "training_documents",
]

CHARACTERS_PER_CALL = 2**20


def training_documents(path: str | None, column: str) -> tuple[datasets.Dataset, list[str]]:
    """The documents at `path`, or the standard library's where it is None, and what to tell about the choice."""
    if path is None:
        return standard_library_documents("train"), []
    documents, notes = read_documents(path, column=column)
    return documents, list(notes)


@dataclass(frozen=True)
class DataSummary:
    """epochs = sequences_needed / sequences: how much text a run has, and how far it goes."""

    documents: int
    """Documents of which the sequences hold a part."""
    tokens: int
    """sequences times their length, separators of documents included."""
    sequences: int
    sequence_length: int
    sequences_needed: int
    """Sequences that the run draws, over all its steps."""
    dropped_tokens: int
    """Tokens of the text that fill no sequence; 0 where the text was not read to its end."""
    empty_documents: int
    """Texts, of those read, that are missing, empty or blank."""
    is_whole_text: bool
    """False where there may be more text than the run needs, so that it was not read to its end."""

    @property
    def epochs(self) -> float:
        return self.sequences_needed / self.sequences


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequence n is tokens[n·L : (n+1)·L]; position_ids[t] = t - max(start of t's document, n·L).

    Items are `{"input_ids": int64 [L], "position_ids": int64 [L]}`: positions restart at 0 where a document starts
    and where the sequence starts. An item depends on its index alone, so workers and resumed runs see the same data.

    Args:
        tokens: int32 [N·L], the token stream.
        document_starts: int64 [documents], increasing offsets into the stream, the first one 0.
        sequence_length: L.
        dropped_tokens, empty_documents, is_whole_text: what `summary` tells of the text beside the sequences.
    """

    def __init__(
        self,
        tokens: Tensor,
        document_starts: Tensor,
        sequence_length: int,
        *,
        dropped_tokens: int = 0,
        empty_documents: int = 0,
        is_whole_text: bool = True,
    ) -> None:
        self.tokens = tokens
        self.document_starts = document_starts
        self.sequence_length = sequence_length
        self.dropped_tokens = dropped_tokens
        self.empty_documents = empty_documents
        self.is_whole_text = is_whole_text

    def __len__(self) -> int:
        return self.tokens.numel() // self.sequence_length

    def share_that_sees_more(self, keys: int) -> float:
        """The part of all tokens that see more than `keys` keys, themselves included, of their document."""
        sequences = torch.arange(0, self.tokens.numel(), self.sequence_length)
        starts = torch.unique(torch.cat([self.document_starts, sequences]))
        lengths = starts.diff(append=torch.tensor([self.tokens.numel()]))
        return float((lengths - keys).clamp_min(0).sum() / self.tokens.numel())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"PackedDataset: index must be in 0..{len(self) - 1}, got {index}")
        first = index * self.sequence_length
        offsets = torch.arange(first, first + self.sequence_length)
        document = torch.searchsorted(self.document_starts, offsets, right=True) - 1
        return {
            "input_ids": self.tokens[first : first + self.sequence_length].long(),
            "position_ids": offsets - self.document_starts[document].clamp_min(first),
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of L, the tokens and the document starts: equal exactly when all items are equal."""
        digest = hashlib.sha256(f"{self.sequence_length} {self.tokens.numel()}".encode())
        digest.update(self.tokens.numpy().astype("<i4", copy=False).data)
        digest.update(self.document_starts.numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()

    @property
    def largest_token_id(self) -> int:
        return int(self.tokens.max())

    def summary(self, sequences_needed: int) -> DataSummary:
        """How far the text goes in a run that draws `sequences_needed` sequences."""
        if sequences_needed < 1:
            raise ValueError(f"PackedDataset: sequences_needed must be at least 1, got {sequences_needed}")
        return DataSummary(
            documents=self.document_starts.numel(),
            tokens=self.tokens.numel(),
            sequences=len(self),
            sequence_length=self.sequence_length,
            sequences_needed=sequences_needed,
            dropped_tokens=self.dropped_tokens,
            empty_documents=self.empty_documents,
            is_whole_text=self.is_whole_text,
        )


def describe(summary: DataSummary) -> str:
    """One line for people, and a second one where the text repeats."""
    line = (
        f"text: {counted(summary.documents, 'document')}, {counted(summary.tokens, 'token')} in "
        f"{counted(summary.sequences, 'sequence')} of {summary.sequence_length:,}; {summary.epochs:.2f} epochs"
    )
    if summary.empty_documents:
        line += f"; {counted(summary.empty_documents, 'empty document')} skipped"
    if summary.dropped_tokens:
        line += f"; {counted(summary.dropped_tokens, 'token')} left over, in no sequence"
    if not summary.is_whole_text:
        line += "; text beyond what the steps need is not read"
    if summary.epochs > 1:
        line += (
            f"\nthe text repeats: the steps draw {counted(summary.sequences_needed, 'sequence')}, "
            f"{summary.epochs:.1f} times what there is; give more text or fewer steps"
        )
    return line


def check_token_ids(largest_id: int, vocab_size: int) -> None:
    """Raises ValueError where largest_id >= vocab_size: the model's embedding has no row for that token."""
    if largest_id >= vocab_size:
        raise ValueError(
            f"check_token_ids: the tokenizer's ids must be below the model's vocab_size = {vocab_size}, got "
            f"{largest_id}; use the tokenizer that the model was trained with, or give the model's embedding the rows "
            "that are missing (model.resize_token_embeddings)"
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """vocab_size: token ids of the model are 0..vocab_size - 1."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def longest_context(config: PreTrainedConfig) -> int | None:
    """max_position_embeddings of a model's text part; None where its config has no such bound."""
    bound = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if bound is None else int(bound)


def length_warning(sequence_length: int, max_position_embeddings: int | None) -> str | None:
    """What to tell where sequences are longer than those the model was trained on; None where they are not."""
    if max_position_embeddings is None or sequence_length <= max_position_embeddings:
        return None
    return (
        f"sequence_length = {sequence_length} is above the model's max_position_embeddings = "
        f"{max_position_embeddings}: the teacher's attention beyond that is not what the model was trained for; give "
        f"--sequence-length {max_position_embeddings} or less, or extend the model's context first"
    )


def pack(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    seed: int,
    max_sequences: int | None = None,
    min_document_tokens: int = 0,
    one_document: bool = False,
    vocab_size: int | None = None,
    progress: bool = False,
) -> PackedDataset:
    """stream = doc_1 <eos> doc_2 <eos> ... in an order drawn from `seed`, cut into sequences of exactly L tokens.

    The last, incomplete sequence is dropped. A tokenizer without an eos token puts its bos token before each document
    instead. The result depends on the documents, the tokenizer and the arguments alone. Tokenising stops as soon as
    `max_sequences` are full.

    Args:
        documents: rows with a string column "text"; empty and missing texts are skipped.
        sequence_length: L.
        seed: of the order of the documents.
        max_sequences: an upper bound on the number of sequences; None: all there is.
        min_document_tokens: shorter documents (separator included) are skipped.
        one_document: cut each document by itself, so that no sequence crosses a boundary: n tokens give n // L
            sequences, the remainder is dropped. Then query t of every sequence sees exactly t + 1 keys.
        vocab_size: of the model (`embedding_rows`), which every token id must be below; None: not checked.
        progress: show a progress bar.

    Raises:
        ValueError: an argument out of range, a tokenizer without eos and bos or with ids beyond vocab_size, or too
            little text for one sequence.
    """
    for name, value, least in (
        ("sequence_length", sequence_length, 1),
        ("max_sequences", 1 if max_sequences is None else max_sequences, 1),
        ("min_document_tokens", min_document_tokens, 0),
    ):
        if value < least:
            raise ValueError(f"pack: {name} must be at least {least}, got {value}")
    wanted = None if max_sequences is None else max_sequences * sequence_length
    parts: list[Tensor] = []
    starts: list[int] = []
    total = tokens_read = longest = empty = 0
    is_whole_text = True
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("tokens", total=wanted)
        for tokens in _tokenised(documents, tokenizer, seed, wanted and max(wanted, min_document_tokens)):
            if tokens is None:
                empty += 1
                continue
            if vocab_size is not None:
                check_token_ids(int(tokens.max()), vocab_size)
            tokens_read, longest = tokens_read + len(tokens), max(longest, len(tokens))
            part = tokens[: len(tokens) // sequence_length * sequence_length] if one_document else tokens
            if len(part) and len(tokens) >= min_document_tokens:
                starts.append(total)
                parts.append(part)
                total += len(part)
                bar.update(task, completed=total)
            if wanted is not None and total >= wanted:
                is_whole_text = False
                break
    if total < sequence_length:
        raise ValueError(
            f"pack: one sequence needs sequence_length={sequence_length} tokens, got {total} (of {tokens_read} read, "
            f"the longest document {longest}, min_document_tokens={min_document_tokens}, one_document={one_document}); "
            "give more text or a shorter sequence_length"
        )
    end = total // sequence_length * sequence_length
    end = end if wanted is None else min(end, wanted)
    boundaries = torch.tensor([start for start in starts if start < end], dtype=torch.int64)
    return PackedDataset(
        torch.cat(parts)[:end].clone(),
        boundaries,
        sequence_length,
        dropped_tokens=tokens_read - end if is_whole_text else 0,
        empty_documents=empty,
        is_whole_text=is_whole_text,
    )


def counted(number: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _tokenised(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seed: int, limit: int | None
) -> Iterator[Tensor | None]:
    """One int32 vector per document, separator included, tokenised many at a time for speed; None for an empty one.

    A document longer than `limit` tokens may come incomplete, but with at least that many.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None and bos is None:
        raise ValueError("pack: tokenizer must have an eos or a bos token to separate documents, got neither")

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def separated(ids: list[int]) -> Tensor:
        return torch.tensor([*ids, eos] if eos is not None else [bos, *ids], dtype=torch.int32)

    waiting: list[str] = []
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    for row in documents.select_columns("text").select(order.tolist()):
        text = row["text"]
        if not text or text.isspace():
            yield None
            continue
        if sum(map(len, waiting)) + len(text) > CHARACTERS_PER_CALL or len(waiting) == 64:
            yield from map(separated, encode(waiting) if waiting else [])
            waiting = []
        if len(text) <= CHARACTERS_PER_CALL:
            waiting.append(text)
            continue
        ids: list[int] = []
        for piece in _pieces(text):
            ids += encode([piece])[0]
            if limit is not None and len(ids) >= limit:
                break
        yield separated(ids)
    yield from map(separated, encode(waiting) if waiting else [])


def _pieces(text: str) -> Iterator[str]:
    """A very long text in pieces that end, where possible, at the end of a line."""
    start = 0
    while start < len(text):
        stop = start + CHARACTERS_PER_CALL
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
