#!/usr/bin/env bash
# transformers 5.23.0 on a CPU, torch 2.13.0, accelerate 1.15.0: transformers.Trainer resumes a model with experts.
#
# A tiny Mixtral trains for three steps and saves a checkpoint. A second Trainer, with a model of the same seed, is told to
# resume from it: before its first step every parameter should be as it was trained. Seen: the router's and all experts'
# weights are those from before any training; two lines about missing and unexpected keys say so, and training goes on.
# Saving writes experts one by one, under the names of the published checkpoints, and the resuming Trainer looks for the
# model's own names. from_pretrained, which knows both, reads the same folder right.
#
# Exits with 0 while this is so, and with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 safetensors==0.8.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/check.py" <<'PYTHON'
import sys
from pathlib import Path
import torch, transformers
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

folder = Path(sys.argv[1]) / "run"
config = MixtralConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    num_local_experts=4, num_experts_per_tok=2,
)


def trainer(steps: int) -> Trainer:
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    rows = [{"input_ids": torch.randint(32, (16,), generator=torch.Generator().manual_seed(n))} for n in range(32)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant",
        save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, optim="sgd",
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


first = trainer(3)
before = {name: x.clone() for name, x in first.model.state_dict().items()}
first.train()
trained = {name: x.clone() for name, x in first.model.state_dict().items()}
read: dict[str, torch.Tensor] = {}


class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **_):  # the checkpoint has been read, no step taken
        read.update({name: x.clone() for name, x in model.state_dict().items()})


resumed = trainer(3)
resumed.add_callback(Look())
resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
wrong = {name for name, x in read.items() if not torch.equal(x, trained[name])}
as_before = {name for name in wrong if torch.equal(read[name], before[name])}
again = MixtralForCausalLM.from_pretrained(folder / "checkpoint-3").state_dict()
whole = all(torch.equal(again[name], x) for name, x in trained.items())
print("transformers", transformers.__version__, "torch", torch.__version__)
print("resumed with values from before any training:", *sorted(as_before))
print("from_pretrained reads the same folder as it was trained:", whole)
layer = "model.layers.0.mlp."
expected = {layer + "gate.weight", layer + "experts.gate_up_proj", layer + "experts.down_proj"}
sys.exit(not (whole and wrong == as_before == expected))
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder" 2>/dev/null
