"""Runs the GPU tests and keeps the verdict: one line in benchmarks/results/gpu_tests.jsonl, whatever came out.

    python benchmarks/gpu_tests.py
    python benchmarks/gpu_tests.py --sanitize memcheck racecheck -- -x -k "smollm2"
    python benchmarks/gpu_tests.py --trees $(git rev-parse HEAD:src HEAD:tests)       where the copy has no .git

The line names what was tested (the tree hashes of src and tests), where (GPU, versions) and the counts. Tests that ran
out of memory, as they may beside others on one GPU, run again one after the other, and that is their verdict. What
follows -- goes to pytest. Exits with pytest's status, or 1 where a sanitizer found something.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from xml.etree.ElementTree import Element

import torch
from packaging.requirements import Requirement

from flash_indexer.bench.timing import environment

ROOT = Path(__file__).resolve().parents[1]
# Small problems of several chunks, over every kernel; those of the sparse stage have a file of their own.
SANITIZED = (
    "tests/gpu/test_poison.py", "tests/gpu/test_heads.py", "tests/gpu/test_heads_once.py",
    "tests/gpu/test_sparse_once.py", "-k",
    "(test_nothing_beside_the_inputs_is_read and documents) or test_memory_that_held_nan or test_sparse_once",
)  # fmt: skip
EXTRAS = ("train", "lora", "kernels")  # of pyproject.toml, which the tests' code imports
LISTED = 40  # failures kept by name
FAILED = 1  # pytest's status where tests failed and nothing else did
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", nargs=2, metavar=("SRC", "TESTS"), help="tree hashes, where git can't be asked")
    parser.add_argument("--sanitize", nargs="*", default=[], choices=TOOLS)
    parser.add_argument("--sanitizer-seconds", type=float, default=240.0)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments, for_pytest = parser.parse_known_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_tests: needs a CUDA GPU of compute capability 9.0, got none")
    if unfit := unfit_packages():
        raise SystemExit(f"gpu_tests: {'; '.join(unfit)}; install what pyproject.toml asks for")
    counts, status = run_pytest([word for word in for_pytest if word != "--"])
    with ThreadPoolExecutor() as together:
        said = together.map(lambda tool: sanitize(tool, arguments.sanitizer_seconds), arguments.sanitize)
        verdicts = dict(zip(arguments.sanitize, said, strict=True))
    record = {
        **environment(arguments.commit),
        "trees": dict(zip(("src", "tests"), arguments.trees or trees(), strict=True)),
        "gpus": torch.cuda.device_count(),
        "arguments": for_pytest,
        **counts,
        "sanitizers": verdicts,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "gpu_tests.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))
    sys.exit(status or any(not verdict["clean"] for verdict in verdicts.values()))


def unfit_packages() -> list[str]:
    """Installed packages of versions that pyproject.toml rules out: what they break says nothing of ours."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [*project["dependencies"], *(x for extra in EXTRAS for x in project["optional-dependencies"][extra])]
    found = []
    for requirement in map(Requirement, wanted):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} must be {requirement.specifier}, got {version}")
    return list(dict.fromkeys(found))


def run_pytest(arguments: list[str]) -> tuple[dict[str, object], int]:
    started = time.monotonic()
    if not any((ROOT / word.split("::")[0]).exists() for word in arguments if not word.startswith("-")):
        arguments = [*arguments, "tests/gpu"]
    cases, status = judged(arguments)
    again = [name for name, case in cases.items() if any("out of memory" in told for told in faults(case))]
    if any(word in ("-x", "--exitfirst") or word.startswith("--maxfail") for word in arguments):
        again = []  # tests behind the first that failed have not run
    if again:
        print(f"gpu_tests: {len(again)} tests that ran out of memory, one after the other", flush=True)
        alone, _ = judged(["-p", "no:xdist", *again])
        cases |= alone
    broken = [case.get("name", "") for case in cases.values() if faults(case)]
    skipped = sum(case.find("skipped") is not None for case in cases.values())
    counts = {
        "passed": len(cases) - skipped - len(broken),
        "failed": len(broken),
        "skipped": skipped,
        "again": len(again),
        "seconds": round(time.monotonic() - started, 1),
        "failures": broken[:LISTED],
    }
    return counts, 0 if again and not broken and status == FAILED else status


def judged(arguments: list[str]) -> tuple[dict[str, Element], int]:
    """Each test's verdict by the name that pytest takes, and pytest's status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [*pytest(), "-q", "-m", "gpu", "--durations=5", f"--rootdir={ROOT}", f"--junitxml={report}"]
        command += ["-o", "junit_family=xunit1", *arguments]  # xunit1 names files
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    return {f"{case.get('file')}::{case.get('name')}": case for case in cases}, status


def faults(case: Element) -> list[str]:
    """What a test failed with."""
    found = [case.find(kind) for kind in ("failure", "error")]
    return [f"{fault.get('message')} {fault.text}" for fault in found if fault is not None]


def sanitize(tool: str, seconds: float) -> dict[str, object]:
    """The verdict on `SANITIZED`. Each tensor has an allocation of its own, so that memcheck sees where it ends."""
    if shutil.which("compute-sanitizer") is None:
        return {"clean": False, "summary": "compute-sanitizer is not on PATH"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *pytest(), "-q", "-x", *SANITIZED]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what the sanitizer started would go on without it
            return {"clean": False, "summary": f"no verdict within {seconds:.0f} s"}
    summary = " · ".join(re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text) + re.findall(r"\d+ passed.*", text))
    if process.returncode:
        print(text)
    return {"clean": process.returncode == 0 and "passed" in summary, "summary": summary or text[-300:]}


def pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-o", "minversion=7.0", "-p", "no:cacheprovider"]


def trees() -> list[str]:
    command = ["git", "rev-parse", "HEAD:src", "HEAD:tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "src", "tests"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or changed.stdout.strip():
        return ["unknown", "unknown"]
    return done.stdout.split()


if __name__ == "__main__":
    main()
