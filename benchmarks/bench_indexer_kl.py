"""The benchmark as a script, for a checkout; what it measures and how is in `flash_indexer.bench.kl`.

python benchmarks/bench_indexer_kl.py --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flash_indexer.bench import kl as bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=",".join(bench.SIZES), help="comma-separated, of " + ", ".join(bench.SIZES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    bench.run(arguments.sizes.split(","), arguments.out, commit=arguments.commit)


if __name__ == "__main__":
    main()
