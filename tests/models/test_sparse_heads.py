"""A sparse model whose processes share attention's heads, from Python: it computes what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROGRAM = """
import json, os
os.environ.update(environment)
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from flash_indexer.models.attach import attach
from flash_indexer.parallel import context_positions
from flash_indexer.parallel.gradients import sum_gradients
from flash_indexer.parallel.mesh import Parallel, make_parallel
dist.init_process_group("gloo")
parallel = make_parallel("cpu", **sizes)
model = AutoModelForCausalLM.from_pretrained(path).double()
torch.manual_seed(0)
handle = attach(model, num_heads=2, head_dim=32, topk=4, parallel=parallel)
handle.indexers.double()
ids, places = torch.arange(24).view(1, 24) % 23, torch.arange(24).view(1, 24)
own = ids, places
if parallel.cp > 1:
    mine = context_positions(24, parallel.cp, parallel.cp_rank, layout=parallel.layout)
    own = ids[:, mine], places[:, mine]
def mean(x):
    x = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(x)
    return (x / dist.get_world_size()).tolist()
handle.indexers.eval()
with torch.no_grad():
    model(input_ids=own[0], position_ids=own[1], use_cache=False)
judged = [float(loss.kl) for loss in handle.losses().values()]
handle.indexers.train()
model.requires_grad_(True)
out = model(input_ids=own[0], position_ids=own[1], use_cache=False).logits
out.logsumexp(-1).sum().backward()
learnt = [float(loss.kl) for loss in handle.losses().values()]
parameters = [*model.parameters(), *handle.indexers.parameters()]
sum_gradients(parameters, replicas=parallel.tp)
found = dict(
    judged=mean(judged), learnt=mean(learnt), norms=[float(x.grad.norm()) for x in parameters if x.grad is not None]
)
if parallel.cp == 1:
    with torch.no_grad():
        found["tokens"] = model.generate(ids[:, :8], max_new_tokens=6, do_sample=False)[0].tolist()
open(f"{out_file}.{dist.get_rank()}", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("sizes", [dict(tp=2), dict(cp=2)], ids=["tp", "cp"])
def test_processes_compute_what_one_does(tmp_path: Path, runs: Any, sizes: dict[str, int]) -> None:
    """KL in evaluation and in training, gradients over all processes, and with whole sequences generation."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, eos_token_id=60, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    model.save_pretrained(tmp_path / "model")
    for name, count, each in (("one", 1, dict()), ("two", 2, sizes)):
        names = dict(path=str(tmp_path / "model"), sizes=each, out_file=str(tmp_path / name))
        runs.finish(runs.ranks(count, None, tmp_path / f"{name} said", codes=[PROGRAM] * count, **names))
    one = json.loads((tmp_path / "one.0").read_text())
    assert all(value > 0 for value in (*one["judged"], *one["norms"]))
    for rank in (0, 1):
        found = json.loads((tmp_path / f"two.{rank}").read_text())
        for name in ("judged", "learnt", "norms"):
            assert found[name] == pytest.approx(one[name], rel=1e-6), name
        assert found.get("tokens", one["tokens"]) == one["tokens"]
