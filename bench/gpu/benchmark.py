"""Runs the GPU benchmarks of the named ops and keeps what it has after each of them in a JSON file.

    python bench/gpu/benchmark.py --out FILE --ops sample,selective_scan [--device cpu]

On the CPU it goes through the same steps with tiny inputs, to try them out; such a file says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import attention
import sampling
import scan
import torch
from report import Report
from timing import Ceilings, measure_ceilings

RUNNERS = {
    "block_sparse_attention": attention.run,
    "selective_scan": scan.run_selective_scan,
    "sample": sampling.run_sample,
    "selective_state_update": scan.run_selective_state_update,
    "causal_conv1d": scan.run_causal_conv1d,
    "token_logprobs": sampling.run_token_logprobs,
    "speculative": sampling.run_speculative,
    "ssd": scan.run_ssd,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ops", default=",".join(RUNNERS), help="comma-separated, measured in this order")
    parser.add_argument("--impls", help="comma-separated; the others are not measured")
    parser.add_argument("--ceilings", type=Path, help="a file with those of an earlier run on this machine")
    parser.add_argument("--verdicts", type=Path, help="only judge the records of this file, and print JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.verdicts:
        content = json.loads(options.verdicts.read_text())
        judged = Report(options.device, Ceilings(**content["ceilings"]), lambda report: None)
        judged.records = content["records"]
        print(
            json.dumps([line for module in (attention, scan, sampling) for line in module.verdicts(judged)])
        )
        return 0
    torch.manual_seed(0)
    if options.ceilings and options.ceilings.is_file():
        ceilings = Ceilings(**json.loads(options.ceilings.read_text()))
    else:
        ceilings = measure_ceilings(options.device)
        print(f"ceilings: {ceilings}", flush=True)
        if options.ceilings:
            options.ceilings.write_text(json.dumps(ceilings.as_dict()))

    def save(report: Report) -> None:
        verdicts = [line for module in (attention, scan, sampling) for line in module.verdicts(report)]
        content = {
            "ceilings": ceilings.as_dict(),
            "records": report.records,
            "skipped": report.skipped,
            "verdicts": verdicts,
        }
        fresh = options.out.with_suffix(".new")
        fresh.write_text(json.dumps(content))
        os.replace(fresh, options.out)

    wanted = frozenset(options.impls.split(",")) if options.impls else None
    report = Report(options.device, ceilings, save, wanted=wanted)
    save(report)
    failed = False
    for op in filter(None, options.ops.split(",")):
        try:
            RUNNERS[op](report)
        except Exception as error:  # the next op may still be measured
            report.skip(op, "all", "arcore", "all", f"{type(error).__name__}: {error}")
        if wanted is None or "arcore" in wanted:
            failed |= report.find(op=op, impl="arcore") is None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
