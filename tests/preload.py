"""Imported once by the server that test processes are forked from: what they would otherwise each do again."""

from __future__ import annotations

import gc
import importlib

import torch

torch.set_num_threads(1)
gc.disable()  # what is imported stays
for name in (
    "flash_indexer.parallel",
    "flash_indexer.recipe.warmup",
    "flash_indexer.testing",
    "matplotlib.figure",
    "torch.distributed.fsdp",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.trainer",
):
    importlib.import_module(name)

from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions, which it keeps
gc.enable()
gc.freeze()  # nor do its forks search it for garbage, and so copy it
