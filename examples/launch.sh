#!/usr/bin/env bash
# The command line on several GPUs, started by torchrun and by accelerate launch.
# usage: launch.sh PROCESSES MODEL DATA OUT [more options of `flash-indexer warmup`]
# PROCESSES is even. Called again, it goes on with the runs that it finds, under any even PROCESSES that divide the
# sequences of a step.
set -euo pipefail
processes=$1 model=$2 data=$3 out=$4
shift 4
if ((processes % 2)); then
    echo "launch.sh: PROCESSES must be even, since two share a sequence (--cp 2), got $processes" >&2
    exit 2
fi

# Each sequence over two processes, the frozen model sharded over all of them by FSDP2. Where a process dies, torchrun
# starts all of them again: it needs the variable and c10d for that, since under static rendezvous (--master-addr,
# --master-port) new processes are handed the store of the dead ones, and may not find each other.
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0 --max-restarts 3 \
    --nproc-per-node "$processes" -m flash_indexer warmup \
    --model "$model" --data "$data" --out "$out/context-parallel" --cp 2 --fsdp --resume "$@"

# Each process with sequences of its own.
accelerate launch --multi_gpu --num_processes "$processes" -m flash_indexer warmup \
    --model "$model" --data "$data" --out "$out/data-parallel" --resume "$@"
