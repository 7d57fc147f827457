#!/usr/bin/env bash
# The command line on several GPUs: torchrun starts a run, accelerate launch goes on with it under another layout.
# usage: launch.sh PROCESSES MODEL DATA OUT [more options of `flash-indexer warmup`]
set -euo pipefail
processes=$1 model=$2 data=$3 out=$4
shift 4

# Each sequence over two processes, the frozen model sharded over all of them.
torchrun --nproc-per-node "$processes" -m flash_indexer warmup \
    --model "$model" --data "$data" --out "$out" --cp 2 --fsdp "$@"

# A run that ended, or was cut off, goes on from its checkpoint: here each process with sequences of its own.
accelerate launch --multi_gpu --num_processes "$processes" -m flash_indexer warmup --out "$out" --resume
