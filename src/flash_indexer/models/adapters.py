"""Low-rank adapters on a model's linear layers, by PEFT, and the model without them again."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel

ALPHA = 2
"""lora_alpha over the rank: an adapter's product is multiplied by so much."""
OF_INDEXERS = re.compile(r".*\.indexer\..*")
"""Names of modules in a model's own indexers."""


def add_adapters(model: PreTrainedModel, rank: int) -> None:
    """W x becomes W x + 2 B A x, A [rank, in] random and B [out, rank] zeros, in every linear layer but the last.

    A model's own indexers are left out, whose parameters train themselves. The adapters alone require gradients then.
    Their parameters are float32.

    Raises:
        ValueError: the package peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"lora: adapters of rank {rank} need the package peft, which can't be imported ({error}); pip install peft"
        ) from error
    has_indexers = any(OF_INDEXERS.fullmatch(name) for name, _ in model.named_modules())
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM",
        exclude_modules=OF_INDEXERS.pattern if has_indexers else None,
    )  # fmt: skip
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge_adapters(model: PreTrainedModel) -> None:
    """Adds each adapter's product to its layer's weight, and takes the adapters off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            layer.merge()
            parent, _, leaf = name.rpartition(".")
            if not isinstance(modules[parent], BaseTunerLayer):  # of experts, each parameter has a wrapper of its own
                setattr(modules[parent], leaf, layer.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)
