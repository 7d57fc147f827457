"""A tiny checkpoint with its tokenizer, and texts for it, shared by the tests of training and the command line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = 60


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers, 6 heads over 2 key heads, whose attention is far from uniform. Read only."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 1, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=WORDS,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in sorted(model.state_dict().items()):
        if "norm" not in name:
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(WORDS)} | {"<eos>": WORDS}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 documents of 20 to 120 words. Read only."""
    path = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for n in range(40):
        words = [f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(20, 120))]
        (path / f"{n:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return path
