#!/usr/bin/env bash
# torch 2.13.0 on a CPU, safetensors 0.8.0: a sharded safetensors checkpoint that replaces one of more processes can't be loaded.
#
# torch.distributed.checkpoint saves a tensor of 9 rows from 3 processes into a folder, then one of 4 rows from 2 processes into
# the same folder, and loads it. With its own format that works: .metadata names the files of the last save. With
# HuggingFaceStorageWriter(save_distributed=True) and HuggingFaceStorageReader it should too. Seen: the third process's file
# of the first save stays, the reader takes every *.safetensors in the folder for a part of the checkpoint, and the load ends
# with "Size mismatch between saved torch.Size([9, 2]) and current: torch.Size([4, 2])". Where both tensors have 9 rows nothing is
# raised, and the last 3 rows are in two of the three files. So save each checkpoint into a new folder, and rename it.
#
# Exits with 0 while this is so, and with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cat > "$folder/check.py" <<'PYTHON'
import os, sys
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as checkpoint, torch.multiprocessing as processes
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def save(rank: int, world: int, folder: str, rows: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    x = distribute_tensor(torch.full((rows, 2), float(world)), init_device_mesh("cpu", (world,)), [Shard(0)])
    checkpoint.save({"x": x}, storage_writer=FileSystemWriter(f"{folder}/own"))
    checkpoint.save({"x": x}, storage_writer=HuggingFaceStorageWriter(f"{folder}/safetensors", save_distributed=True))
    dist.destroy_process_group()


def loaded(reader: object) -> str:
    x = torch.zeros(4, 2)
    try:
        checkpoint.load({"x": x}, storage_reader=reader, no_dist=True)
    except BaseException as error:  # CheckpointException is no Exception
        return str(error).strip().splitlines()[-1]
    return str(x[:, 0].tolist())


if __name__ == "__main__":
    folder = sys.argv[1]
    processes.spawn(save, (3, folder, 9), nprocs=3)
    processes.spawn(save, (2, folder, 4), nprocs=2)
    found = sorted(file.name for file in Path(folder, "safetensors").iterdir())
    own, other = loaded(FileSystemReader(f"{folder}/own")), loaded(HuggingFaceStorageReader(f"{folder}/safetensors"))
    print("torch", torch.__version__, "its own format:", own)
    print("safetensors:", other, "with", *found)
    mismatch = "Size mismatch between saved torch.Size([9, 2]) and current: torch.Size([4, 2])" in other
    sys.exit(not (own == "[2.0, 2.0, 2.0, 2.0]" and mismatch and len(found) == 3))
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder" 2>/dev/null
