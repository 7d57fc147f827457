"""The sparse stage as a plain Python loop: a model and its warmed-up indexers train, then generate."""

import argparse
from pathlib import Path

import torch

from flash_indexer.files.native import load_native
from flash_indexer.files.trained import load_sparse, save_sparse, trainable
from flash_indexer.models.load import load_model
from flash_indexer.recipe.data import load_documents, pack
from flash_indexer.recipe.language_loss import labels

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--indexers", required=True, help="a native folder: the run's checkpoint/ or an export")
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--topk", type=int, default=2048)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--sequence-length", type=int, default=4096)
options = parser.parse_args()
if options.topk >= options.sequence_length:
    raise SystemExit(
        f"--topk must be below --sequence-length = {options.sequence_length}, got {options.topk}: else none is left out"
    )
if Path(options.out).exists():
    raise SystemExit(f"--out must not exist yet, got {options.out}")

device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = load_model(options.model, dtype=torch.float32)
packed = pack(load_documents(options.data), tokenizer, sequence_length=options.sequence_length, seed=0)

model.to(device).requires_grad_(True)
handle = load_native(model, options.indexers, topk=options.topk)  # each query attends to topk keys from here on
own = list(trainable(model, handle.indexers).values())  # the model's, without the indexers that it may have itself
groups = [
    {"params": own, "lr": 7.3e-6},
    {"params": handle.indexers.parameters(), "lr": 7.3e-6, "eps": 1e-12},
]
optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
for step in range(options.steps):
    batch = {name: x[None].to(device) for name, x in packed[step % len(packed)].items()}
    targets = labels(batch["input_ids"], batch["position_ids"])  # none across a document's end
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = model(**batch, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    loss.backward()  # the indexers' gradients, of their KL alone, come with it
    torch.nn.utils.clip_grad_norm_(own, 1.0)  # the model's alone
    optimizer.step()
    optimizer.zero_grad()
    losses = [loss.kl for loss in handle.losses().values()]
    print(f"step {step + 1}: loss {loss:.3f}, KL {sum(losses) / len(losses):.4f}")
save_sparse(handle, options.out, tokenizer=tokenizer, base_name=options.model)

sparse, tokenizer = load_sparse(options.out, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
sparse.model.to(device)
prompt = packed[0]["input_ids"][None, : min(32, options.sequence_length)].to(device)
tokens = sparse.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
print("generated:", tokenizer.decode(tokens[0, prompt.shape[1] :]))
