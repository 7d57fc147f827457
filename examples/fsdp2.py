"""A loop over processes with the frozen model sharded by FSDP2: torchrun --nproc-per-node 8 examples/fsdp2.py ..."""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from flash_indexer.files.export import export
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model
from flash_indexer.models.sharding import shard_model
from flash_indexer.parallel.gradients import sum_gradients
from flash_indexer.parallel.mesh import make_parallel
from flash_indexer.recipe.data import load_documents, pack
from flash_indexer.recipe.warmup import default_dtype

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--sequence-length", type=int, default=1024)
options = parser.parse_args()
if "RANK" not in os.environ:
    raise SystemExit("start this with torchrun: torchrun --nproc-per-node 1 examples/fsdp2.py ...")
if Path(options.out).exists():
    raise SystemExit(f"--out must not exist yet, got {options.out}")

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())

model, tokenizer = load_model(options.model, dtype=default_dtype())
packed = pack(load_documents(options.data), tokenizer, sequence_length=options.sequence_length, seed=0)

if world == 1:
    model.to(device)  # nothing to share out: FSDP2 would move it
shard_model(model, make_parallel(device), fsdp=True)  # before attach: the indexers stay whole on every process
torch.manual_seed(0)  # and begin with the same weights everywhere
handle = attach(model)
handle.token_weight = 1 / (world * options.sequence_length)  # a mean over all tokens of an optimizer step
optimizer = torch.optim.AdamW(handle.indexers.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-12)
for step in range(options.steps):
    batch = {name: x[None].to(device) for name, x in packed[(step * world + rank) % len(packed)].items()}
    with torch.no_grad():
        handle.decoder(**batch, use_cache=False)  # every layer's backward runs inside
    sum_gradients(handle.indexers.parameters())  # one all-reduce
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        losses = [loss.kl for loss in handle.losses().values()]
        print(f"step {step + 1}: KL {sum(losses) / len(losses):.4f}")
if rank == 0:
    export(handle, options.out, format="native")
dist.destroy_process_group()
