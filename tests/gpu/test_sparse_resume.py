"""Runs on a GPU that are killed after a checkpoint, and resumed: the bits of a run that was not killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from flash_indexer.files.native import save_native
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model, model_fingerprint
from flash_indexer.recipe.run_record import WarmupSettings, read_metrics

pytestmark = pytest.mark.gpu
CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=192, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512, bos_token_id=None, eos_token_id=60,
)  # fmt: skip
STEPS = 40
KERNELS = """
from flash_indexer.ops import bodies
needed = bodies.need_kernels()
needed.__enter__()  # until the process ends
"""
SPARSE = """
import io
from rich.console import Console
from flash_indexer.recipe.sparse import train_sparsely
from flash_indexer.recipe.sparse_record import SparseRunSettings
train_sparsely(SparseRunSettings(**chosen), out, resume=True, console=Console(file=io.StringIO()))
"""
HANG = 120.0  # seconds after which a process is taken to hang


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A Llama whose sizes the kernels take. Read only."""
    path = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIG)
    for name, parameter in made.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.15 + ("norm" in name))
    made.save_pretrained(path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def indexers(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Fresh ones. Read only."""
    path = tmp_path_factory.mktemp("fresh") / "indexers"
    torch.manual_seed(0)
    made, _ = load_model(model, dtype=torch.float32)
    handle = attach(made, num_heads=4, head_dim=64)
    save_native(handle, path, base_name=str(model), base_fingerprint=model_fingerprint(made))
    return path


@pytest.mark.parametrize("stage", ["sparse", "warmup"])
def test_after_a_kill_the_run_goes_on_with_the_same_bits(
    tmp_path: Path, runs: Any, model: Path, indexers: Path, texts: Path, stage: str
) -> None:
    """By the kernels: attention to selected keys with the model in training; and `warmup --queries 0.25`."""
    common: dict[str, Any] = dict(data=str(texts), sequence_length=256, batch_size=2, steps=STEPS, save_every=4)
    if stage == "sparse":
        common |= dict(init_from=str(indexers), topk=16, lr=1e-3, indexer_lr=1e-3)
        code, settings = SPARSE, None
    else:
        code = ""
        settings = WarmupSettings(**common, model=str(model), queries=0.25, num_heads=4, warmup_steps=4)

    def start(name: str) -> Any:
        return runs.start(KERNELS + code, settings, tmp_path / name, chosen=common)

    whole, cut = start("whole"), start("cut")
    try:
        began = time.monotonic()
        while not (tmp_path / "cut" / "checkpoint" / "training_state.json").exists():
            assert cut.exitcode is None and time.monotonic() - began < HANG
            time.sleep(1e-3)
    except BaseException:
        whole.kill()
        raise
    finally:
        cut.kill()
    cut.join()
    assert cut.exitcode == -signal.SIGKILL
    assert 4 <= len(read_metrics(tmp_path / "cut" / "metrics.jsonl")) < STEPS
    runs.finish([whole])
    runs.finish([start("cut")])
    one, other = (
        [row | dict(seconds=0) for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")
    )
    assert len(one) == STEPS and one == other
    for file in sorted((tmp_path / "whole" / "checkpoint").iterdir()):
        assert file.read_bytes() == (tmp_path / "cut" / "checkpoint" / file.name).read_bytes(), file.name
