#!/bin/sh
# Builds every seeded bug of mutants.md on sm_90a, in the variants of head_dim 128 that take any groups and scales:
# mutants.sh OUT_DIR. check.py --mutants then must kill each.
set -e
here=$(cd "$(dirname "$0")" && pwd)
last=27
for k in $(seq 1 $last); do
    for only in common stage1_d128_gx; do
        MUTANT=$k ONLY=$only "$here/build.sh" "$1/$k" sm_90a
    done
done
