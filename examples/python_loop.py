"""Warm-up as a plain Python loop in one process: nothing but torch, a Transformers model and `attach`."""

import argparse
from pathlib import Path

import torch

from flash_indexer.files.export import export
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model
from flash_indexer.recipe.data import load_documents, pack
from flash_indexer.recipe.warmup import default_dtype

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--sequence-length", type=int, default=1024)
options = parser.parse_args()
if Path(options.out).exists():
    raise SystemExit(f"--out must not exist yet, got {options.out}")

device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = load_model(options.model, dtype=default_dtype())
packed = pack(load_documents(options.data), tokenizer, sequence_length=options.sequence_length, seed=0)

handle = attach(model.to(device))
optimizer = torch.optim.AdamW(handle.indexers.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-12)
for step in range(options.steps):
    batch = {name: x[None].to(device) for name, x in packed[step % len(packed)].items()}
    with torch.no_grad():
        handle.decoder(**batch, use_cache=False)  # every layer's backward runs inside
    optimizer.step()
    optimizer.zero_grad()
    losses = [loss.kl for loss in handle.losses().values()]
    print(f"step {step + 1}: KL {sum(losses) / len(losses):.4f}")
export(handle, options.out, format="native")
