"""The text that a run's indexers are judged on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from flash_indexer.models.load import EMBEDDED_MODEL, load_tokenizer
from flash_indexer.recipe.data import load_documents, pack, standard_library_documents
from flash_indexer.recipe.run_record import settings_from

__all__ = ["held_out_batches"]

HELD_OUT_SPLITS = ("validation", "test")


def held_out_batches(
    run: Mapping[str, Any], data: str | None, sequences: int, *, column: str | None = None
) -> list[dict[str, Tensor]]:
    """At most `sequences` batches of one packed sequence: `{"input_ids": int64 [1, L], "position_ids": int64 [1, L]}`.

    Args:
        run: settings of a run, as `read_run` gives them: model, sequence_length = L, seed and column.
        data: text as `load_documents` takes it, of several splits the validation or test split; None:
            the standard library's held-out half, each sequence from one document.
        column: the column that holds the text, where it is not the one of the run.

    Raises:
        ValueError, FileNotFoundError: as `load_documents`, `load_tokenizer` and `pack` do; of token ids beyond the
            vocabulary of the model's config too.
    """
    told = {name: run[name] for name in ("model", "sequence_length", "seed", "column") if name in run}
    settings = settings_from(told)  # without those of the training, which such sequences may not suit
    tokenizer = load_tokenizer(settings.model)
    if data is None:
        documents = standard_library_documents("heldout")
    else:
        documents = load_documents(data, column=settings.column if column is None else column, splits=HELD_OUT_SPLITS)
    packed = pack(
        documents, tokenizer, sequence_length=settings.sequence_length, seed=settings.seed, max_sequences=sequences,
        one_document=data is None, vocab_size=_vocab_size(settings.model),
    )  # fmt: skip
    return [{name: value[None] for name, value in packed[index].items()} for index in range(len(packed))]


def _vocab_size(model: str) -> int | None:
    """Of a checkpoint's config. The embedded model and its tokenizer are one file, and parsing that takes long."""
    if model == EMBEDDED_MODEL:
        return None
    return int(AutoConfig.from_pretrained(model, local_files_only=True).get_text_config().vocab_size)
