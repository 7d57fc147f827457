"""The sparse stage with `transformers.Trainer`, in one process: a model and its warmed-up indexers train.

In --out are then a Transformers checkpoint with its tokenizer and the indexers: load_native(load_model(out)[0], out,
topk=K) is the sparse model, which generates.
"""

import argparse

import torch
from transformers import TrainingArguments

from flash_indexer.files.native import load_native
from flash_indexer.models.load import load_model
from flash_indexer.recipe.data import load_documents, pack
from flash_indexer.recipe.sparse_trainer import SparseTrainer

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

model, tokenizer = load_model(options.model, dtype=torch.float32)
packed = pack(load_documents(options.data), tokenizer, sequence_length=options.sequence_length, seed=0)

model.requires_grad_(True)
handle = load_native(model, options.indexers, topk=options.topk)  # each query attends to topk keys from here on
arguments = TrainingArguments(
    options.out, max_steps=options.steps, learning_rate=7.3e-6, lr_scheduler_type="constant", max_grad_norm=1.0,
    per_device_train_batch_size=1, logging_steps=10, bf16=torch.cuda.is_available(), report_to="none",
)  # fmt: skip
trainer = SparseTrainer(handle, indexer_lr=7.3e-6, args=arguments, train_dataset=packed)
trainer.train()
trainer.save_model()
tokenizer.save_pretrained(options.out)
