"""All benchmarks: `make bench`, or `python -m benchmarks`. Each part is also a command of its own.

The whole-process part makes three 0.5b checkpoints (1 GB each) in a temporary folder; larger ones:
python -m benchmarks.merges --geometry 1.8b --work DIR.
"""

from __future__ import annotations

import subprocess
import sys

PARTS = (
    ["benchmarks.kernels"],
    ["benchmarks.accuracy"],
    ["benchmarks.merges", "--geometry", "0.5b"],
)


def main() -> int:
    """Runs the parts one after the other; the first failure's code."""
    for part in PARTS:
        print(f"\n{' '.join(part)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *part], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
