"""judge.teacher_check: the sums of a teacher's probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

from flash_indexer.judge.fp8_check import fp8_check
from flash_indexer.judge.teacher_check import teacher_errors
from flash_indexer.models.attach import IndexerHandle, attach


def test_a_teacher_that_is_not_finite_is_not_called_right(
    handle: IndexerHandle, batches: list[dict[str, Tensor]]
) -> None:
    assert max(teacher_errors(handle, batches[0]).values()) < 1e-5
    with torch.no_grad():
        handle.decoder.layers[0].self_attn.q_proj.weight[0, 0] = math.nan
    assert math.isnan(teacher_errors(handle, batches[0])[0])


def test_sinks_count_as_a_key() -> None:
    config = GptOssConfig(
        vocab_size=61, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_local_experts=2, num_experts_per_tok=1, sliding_window=9,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.tensor([-1.0, 0.5, 2.0, 4.0])
    handle = attach(model, num_heads=2, head_dim=32)
    errors = teacher_errors(handle, dict(input_ids=torch.arange(20)[None], position_ids=torch.arange(20)[None]))
    assert list(errors) == [1] and errors[1] < 1e-5
    with pytest.raises(ValueError, match="fp8_check: attention must have no sinks and no softcap, got layer 1 of one"):
        fp8_check(handle, dict(input_ids=torch.arange(20)[None], position_ids=torch.arange(20)[None]))
