"""Warm-up with `transformers.Trainer`, by python or, over 8 processes, torchrun --nproc-per-node 8 trainer.py ..."""

import argparse

from transformers import TrainingArguments

from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model
from flash_indexer.recipe.data import load_documents, pack
from flash_indexer.recipe.trainer import IndexerTrainer
from flash_indexer.recipe.warmup import default_dtype

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--sequence-length", type=int, default=1024)
options = parser.parse_args()

model, tokenizer = load_model(options.model, dtype=default_dtype())
packed = pack(load_documents(options.data), tokenizer, sequence_length=options.sequence_length, seed=0)

handle = attach(model)
arguments = TrainingArguments(
    options.out, max_steps=options.steps, learning_rate=1e-3, warmup_steps=20, lr_scheduler_type="cosine",
    adam_epsilon=1e-12, per_device_train_batch_size=1, logging_steps=10, report_to="none",
)  # fmt: skip
trainer = IndexerTrainer(handle, args=arguments, train_dataset=packed)
trainer.train()
trainer.save_model()
