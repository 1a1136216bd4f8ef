"""Small checks of one op, for a run under compute-sanitizer: `python bench/gpu/sanitize.py OP [--device cpu]`.

Runs the checks that tests/<op>/gpu_cases.py names in SANITIZED. Their results are compared with the references too.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op")
    parser.add_argument("--first", action="store_true", help="the first check only")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    cases = importlib.import_module(f"tests.{options.op}.gpu_cases")
    torch.set_num_threads(1)
    for check in cases.SANITIZED[:1] if options.first else cases.SANITIZED:
        torch.manual_seed(0)
        check(options.device, True)
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(f"{options.op}: {check.__name__} passed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
