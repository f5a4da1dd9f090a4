"""How much longer `import tunesmith` takes than `import torch` alone (goal: at most 0.3 s).

    python benchmarks/import_time.py --output benchmarks/results/import_time.json
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from result import keep


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path)
args = parser.parse_args()
CODES = {"torch": "import torch", "tunesmith": "import torch, tunesmith", "with every method": "import torch, tunesmith; tunesmith.methods()"}
times = {name: [] for name in CODES}
for _ in range(7):
    for name, code in CODES.items():
        times[name].append(seconds(code))
median = {name: statistics.median(each) for name, each in times.items()}
result = {
    "what": "seconds of a fresh interpreter, medians of 7 interleaved runs", "command": "python benchmarks/import_time.py", "machine": {"cores": os.cpu_count()},
    "seconds": median, "tunesmith_beyond_torch_s": median["tunesmith"] - median["torch"], "methods_beyond_torch_s": median["with every method"] - median["torch"],
}  # fmt: skip
keep(result, args.output)
