"""Runs on a GPU that are killed after a checkpoint, and resumed: the bits of a run that was not killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, LlamaConfig

from flash_indexer.files.native import save_native
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model, model_fingerprint
from flash_indexer.recipe.run_record import WarmupSettings, read_metrics

pytestmark = pytest.mark.gpu
SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=192, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=512,
    bos_token_id=None, eos_token_id=60,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2, head_dim=64),
    "mla": DeepseekV3Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=64, n_group=2, topk_group=1, n_shared_experts=1,
    ),
}  # fmt: skip
STEPS = 40
KERNELS = """
from flash_indexer.ops import bodies
needed = bodies.need_kernels()
needed.__enter__()  # until the process ends
"""
SPARSE = """
import io, os
os.environ.update(environment)
from rich.console import Console
from flash_indexer.recipe.processes import ParallelSettings, leave
from flash_indexer.recipe.sparse import train_sparsely
from flash_indexer.recipe.sparse_record import SparseRunSettings
train_sparsely(SparseRunSettings(**chosen), out, resume=True, console=Console(file=io.StringIO()),
               parallel=ParallelSettings(**parallel, timeout=60.0))
leave()
"""
HANG = 120.0  # seconds after which a process is taken to hang


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Callable[[str], tuple[Path, Path]]:
    """begun("mla"): a model whose sizes the kernels take, and fresh indexers of it. Read only."""
    made: dict[str, tuple[Path, Path]] = {}

    def begin(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name])
            for parameter_name, parameter in model.named_parameters():
                parameter.data.copy_(torch.randn(parameter.shape) * 0.15 + ("norm" in parameter_name))
            model.save_pretrained(folder / "model")
            AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder / "model")
            loaded, _ = load_model(folder / "model", dtype=torch.float32)
            handle, base = attach(loaded, num_heads=4, head_dim=64), model_fingerprint(loaded)
            save_native(handle, folder / "indexers", base_name=str(folder / "model"), base_fingerprint=base)
            made[name] = folder / "model", folder / "indexers"
        return made[name]

    return begin


@pytest.mark.parametrize(
    ("name", "changes", "parallel"),
    [
        ("llama", {}, {}),
        ("llama", dict(lora=4), {}),
        ("mla", dict(activation_checkpointing=True), {}),
        pytest.param("llama", {}, dict(fsdp=True), marks=TWO),
        pytest.param("mla", {}, dict(cp=2, fsdp=True), marks=TWO),
        pytest.param("llama", {}, dict(tp=2), marks=TWO),
    ],
    ids=["llama", "adapters", "mla", "fsdp", "mla, cp and fsdp", "tp"],
)
def test_a_killed_sparse_run_goes_on_with_the_same_bits(
    tmp_path: Path, runs: Any, begun: Any, texts: Path, name: str, changes: dict[str, Any], parallel: dict[str, Any]
) -> None:
    """By the kernels: attention to selected keys with the model in training, or with adapters."""
    common: dict[str, Any] = dict(data=str(texts), sequence_length=256, batch_size=2, steps=STEPS, save_every=4)
    common |= dict(init_from=str(begun(name)[1]), topk=16, lr=1e-3, indexer_lr=1e-3) | changes
    assert_same_bits_after_a_kill(tmp_path, runs, SPARSE, None, 2 if parallel else 1, chosen=common, parallel=parallel)


def test_a_killed_warm_up_goes_on_with_the_same_bits(tmp_path: Path, runs: Any, begun: Any, texts: Path) -> None:
    """`warmup --queries 0.25`, by the kernels."""
    settings = WarmupSettings(
        data=str(texts), sequence_length=256, batch_size=2, steps=STEPS, save_every=4, model=str(begun("llama")[0]),
        queries=0.25, num_heads=4, warmup_steps=4,
    )  # fmt: skip
    assert_same_bits_after_a_kill(tmp_path, runs, "", settings, 1)


def assert_same_bits_after_a_kill(
    folder: Path, runs: Any, code: str, settings: WarmupSettings | None, count: int, **names: Any
) -> None:
    """All processes are killed between the first checkpoint and the last step, and started again."""

    def start(name: str) -> list[Any]:
        places: list[dict[str, str]] = [{}] if count == 1 else runs.ports.places(count)
        return [runs.start(KERNELS + code, settings, folder / name, environment=place, **names) for place in places]

    whole, cut = start("whole"), start("cut")
    try:
        began = time.monotonic()
        while not (folder / "cut" / "checkpoint" / "training_state.json").exists():
            assert all(process.exitcode is None for process in cut) and time.monotonic() - began < HANG
            time.sleep(1e-3)
    except BaseException:
        for process in whole:
            process.kill()
        raise
    finally:
        for process in cut:
            process.kill()
    for process in cut:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 4 <= len(read_metrics(folder / "cut" / "metrics.jsonl")) < STEPS
    runs.finish(whole)
    runs.finish(start("cut"))
    one, other = (
        [row | dict(seconds=0) for row in read_metrics(folder / name / "metrics.jsonl")] for name in ("whole", "cut")
    )
    assert len(one) == STEPS and one == other
    files = sorted((folder / "whole" / "checkpoint").iterdir())
    assert [file.name for file in files] == sorted(file.name for file in (folder / "cut" / "checkpoint").iterdir())
    for file in files:
        assert file.read_bytes() == (folder / "cut" / "checkpoint" / file.name).read_bytes(), file.name
