"""Checks the kernels against numpy and an f64 reference on a GPU, then times them.

    python3 check.py KERNELS [--append-seconds S] [--fuzz-seconds S] [--special] [--time] [--seed N] [--json FILE]
    python3 check.py MUTANTS --mutants SECONDS

KERNELS is the folder that dev/build.sh filled, MUTANTS the one of dev/mutants.sh; instances.toml must lie in it or above it. Needs torch and numpy.
"""

import argparse
import json
import pathlib
import sys

import torch

from append_check import check_append
from fuzz import check_invariance, check_large_pool, fuzz, kill_mutants
from launch import DEV, Kernels
from timing import bandwidth, bench, bench_append, standard_cases


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels")
    parser.add_argument("--append-seconds", type=float, default=0)
    parser.add_argument("--fuzz-seconds", type=float, default=0)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--mutants", type=float, default=0, help="KERNELS holds mutants; seconds for each")
    parser.add_argument("--special", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.zeros(1, device=DEV)
    torch.manual_seed(args.seed)
    if args.mutants:
        ok = kill_mutants(args.kernels, args.mutants, args.seed)
        print("OK" if ok else "FAILED")
        sys.exit(0 if ok else 1)
    kernels = Kernels(args.kernels)
    ok = True
    if args.case is not None:
        ok &= fuzz(kernels, 0.001, args.case)
    if args.append_seconds:
        ok &= check_append(kernels, args.append_seconds, args.seed)
    if args.fuzz_seconds:
        ok &= fuzz(kernels, args.fuzz_seconds, args.seed)
    if args.special:
        ok &= check_invariance(kernels)
        ok &= check_large_pool(kernels)
    if args.time:
        read, copy = bandwidth(kernels)
        name = torch.cuda.get_device_name()
        print(f"{name}: read {read:.0f} GB/s, copy {copy:.0f} GB/s")
        bench_append(kernels, copy)
        cases = [c for c in standard_cases() if args.only in c[0]]
        rows = bench(kernels, cases, read)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(dict(gpu=name, read_gb_per_s=read, copy_gb_per_s=copy, rows=rows)))
    print("OK" if ok else "FAILED")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
