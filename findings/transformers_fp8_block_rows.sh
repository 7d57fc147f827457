#!/usr/bin/env bash
# transformers 5.23.0 on a CPU, torch 2.13.0: a checkpoint in FP8 blocks of 128 x 128 whose weight has 192 rows.
#
# A weight of 192 rows and 96 columns has two blocks: rows 0 to 127 and rows 128 to 191, with a scale each. Reading it with
# the quantization_config of DeepSeek-V3's format should give values times the scale of their block. Seen: no error and no
# warning, but 96 rows a block, so that rows 96 to 127 are multiplied by the scale of the second block.
#
# Exits with 0 while this is so, and with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 safetensors==0.8.0 accelerate==1.15.0
cat > "$folder/check.py" <<'PYTHON'
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder, block = Path(sys.argv[1]) / "model", 128
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=16, hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
)
weights = LlamaForCausalLM(config).state_dict()
name = "model.layers.0.mlp.up_proj.weight"
stored, expected = {}, None
for key, weight in weights.items():
    if not key.endswith("proj.weight"):
        stored[key] = weight.clone()
        continue
    if key == name:
        weight = weight * torch.linspace(1, 30, 192)[:, None]  # rows of different size: scales differ
    rows, columns = (-(-n // block) for n in weight.shape)
    values, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    exact = torch.empty(weight.shape, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = weight[part].abs().max() / 448
            values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[part] = values[part].double() * scales[i, j].double()
    stored[key], stored[key + "_scale_inv"] = values, scales
    expected = exact if key == name else expected
folder.mkdir()
save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
quantization = dict(quant_method="fp8", weight_block_size=[block, block], activation_scheme="dynamic", dequantize=True)
(folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": quantization,
                                                                     "architectures": ["LlamaForCausalLM"]}))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
got = model.state_dict()[name].double()
error = (got - expected).abs().amax(1) / expected.abs().max()
wrong = (error > 1e-3).nonzero()[:, 0].tolist()
print(f"transformers {transformers.__version__}, torch {torch.__version__}: rows that are wrong: "
      f"{wrong[0] if wrong else None} to {wrong[-1] if wrong else None}, by up to {float(error.max()):.0%} of the largest weight")
sys.exit(0 if wrong == list(range(96, 128)) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder"
