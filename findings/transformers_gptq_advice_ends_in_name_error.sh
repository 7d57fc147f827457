#!/usr/bin/env bash
# transformers 5.23.0, optimum 2.3.0, torch 2.13.0 on a CPU: a GPTQ checkpoint, packages installed as the messages ask.
#
# Reading a checkpoint with quantization_config {"quant_method": "gptq", "bits": 4} needs two packages. Without both Transformers
# says "requires optimum (`pip install optimum`)". With optimum installed it should say, as its code has it, "requires gptqmodel
# (`pip install gptqmodel`) library". Seen: NameError: name 'QuantizeConfig' is not defined. The quantiser's constructor makes an
# object of optimum's, which uses a name that optimum imports only where gptqmodel is, before validate_environment is asked. A program
# that catches ImportError and ValueError around from_pretrained, to tell its user what to install, ends with a traceback.
#
# Exits with 0 while this is so, and with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0
cat > "$folder/check.py" <<'PYTHON'
import json, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

path = Path(sys.argv[1]) / "model"
sizes = dict(vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
config = json.loads((path / "config.json").read_text())
(path / "config.json").write_text(json.dumps(config | dict(quantization_config=dict(quant_method="gptq", bits=4))))
found = {}
for name in ("transformers", "optimum", "gptqmodel"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "absent"
try:
    AutoModelForCausalLM.from_pretrained(path)
    said = "no error"
except Exception as error:
    said = f"{type(error).__name__}: {error}"
print(", ".join(map(" ".join, found.items())), "->", said.partition("\n")[0])
sys.exit(0 if said.startswith(sys.argv[2]) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder" "ImportError: Loading a GPTQ quantized model requires optimum" ||
  { echo "changed: optimum is not asked for"; exit 1; }
"$folder/venv/bin/pip" install --quiet optimum==2.3.0
"$folder/venv/bin/python" "$folder/check.py" "$folder" "NameError" || { echo "changed: no NameError"; exit 1; }
echo "still so: who installs what is asked for gets a NameError"
