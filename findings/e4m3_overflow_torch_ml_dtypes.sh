#!/usr/bin/env bash
# torch 2.13.0 on a CPU and ml_dtypes 0.5.4 convert float32 to e4m3 (float8_e4m3fn) differently above the largest number.
#
# e4m3's largest number is 448, and the format has no infinity. For 465, 470, 1000 and infinity torch 2.13.0 returns 448;
# ml_dtypes returns NaN from 465 on (464 is the middle between 448 and the next step, and still 448 in both). A NaN stays
# NaN in both. So a row that is scaled by a power of two which is rounded to nearest, and not up, keeps its largest entries
# in one library and loses them in the other: scales have to be rounded up.
#
# Exits with 0 while this is so, and with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet ml_dtypes==0.5.4 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import ml_dtypes, numpy, torch

numbers = [448.0, 464.0, 465.0, 470.0, 1000.0, float("inf"), float("nan")]
by_torch = torch.tensor(numbers).to(torch.float8_e4m3fn).float().tolist()
by_ml_dtypes = numpy.array(numbers, dtype=numpy.float32).astype(ml_dtypes.float8_e4m3fn).astype(numpy.float32).tolist()
print(f"torch {torch.__version__}, ml_dtypes {ml_dtypes.__version__}")
for row in zip(numbers, by_torch, by_ml_dtypes):
    print("%8g -> torch %g, ml_dtypes %g" % row)
seen = [str(x) for x in by_torch + by_ml_dtypes]
sys.exit(0 if seen == ["448.0"] * 6 + ["nan"] + ["448.0"] * 2 + ["nan"] * 5 else 1)
PYTHON
