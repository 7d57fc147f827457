#!/usr/bin/env bash
# torch 2.13.0 on a CPU: the first backward(gradient) of a process imports SymPy, which no tensor of it needs.
#
# A new process imports torch and calls backward on a scalar: neither has SymPy in it. Then it calls backward on a vector with
# the gradient that a vector needs; no shape is symbolic, nothing is compiled. Expected: microseconds, as for the scalar.
# Seen: sympy, mpmath and torch.fx.experimental.symbolic_shapes are imported, in 0.9 s here (3.5 s where files were cold);
# the same call again takes 0.2 ms. torch.autograd.grad with grad_outputs does the same. So the time of a first call, in
# a benchmark or behind a service's first request, can be SymPy's and not the operator's.
#
# Exits with 0 while this is so, and with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat > "$folder/check.py" <<'PYTHON'
import sys, time
import torch

NAMES = ("sympy", "mpmath", "torch.fx.experimental.symbolic_shapes")


def imported() -> list[str]:
    return [name for name in NAMES if name in sys.modules]


def seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


x = torch.ones(3, requires_grad=True)
steps = {"import torch": (imported(), 0.0)}
scalar = (2 * x).sum()
steps["backward() of a scalar"] = (seconds(scalar.backward), imported())[::-1]
calls = {
    "backward(gradient)": lambda: (2 * x).backward(torch.ones(3)),
    "torch.autograd.grad(y, x, gradient)": lambda: torch.autograd.grad(2 * x, x, torch.ones(3)),
}
name = sys.argv[1]
steps[name] = (seconds(calls[name]), imported())[::-1]
steps[f"{name}, again"] = (seconds(calls[name]), imported())[::-1]
print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
for step, (modules, took) in steps.items():
    print(f"  {step}: {took * 1e3:.1f} ms, imported {modules}")
before, after = steps["backward() of a scalar"][0], steps[name][0]
sys.exit(0 if before == [] and after == list(NAMES) else 1)
PYTHON
for call in "backward(gradient)" "torch.autograd.grad(y, x, gradient)"; do
  "$folder/venv/bin/python" "$folder/check.py" "$call" || { echo "changed: SymPy is not imported by $call"; exit 1; }
done
echo "still so: the first backward with a gradient imports SymPy"
