"""Low-rank adapters on a model's linear layers, by PEFT, and the model without them again."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

ALPHA = 2
"""lora_alpha over the rank: an adapter's product is multiplied by so much."""


def add_adapters(model: PreTrainedModel, rank: int) -> None:
    """W x becomes W x + 2 B A x, A [rank, in] random and B [out, rank] zeros, in every linear layer but the last.

    The adapters alone require gradients then. Their parameters are float32.

    Raises:
        ValueError: the package peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"lora: adapters of rank {rank} need the package peft, which can't be imported ({error}); pip install peft"
        ) from error
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge_adapters(model: PreTrainedModel) -> None:
    """Adds each adapter's product to its layer's weight, and takes the adapters off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            layer.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)
