#!/bin/sh
# Builds every seeded bug of mutants.md on sm_90a, in the variants of head_dim 128 that take any groups and scales, or, where it is in
# the kernels of items alone, groups of 8: mutants.sh OUT_DIR. check.py --mutants then must kill each.
set -e
here=$(cd "$(dirname "$0")" && pwd)
last=28
for k in $(seq 1 $last); do
    units="common stage1_d128_gx"
    [ "$k" = 28 ] && units="common stage1_d128_g8 items_d128_g8"
    for only in $units; do
        MUTANT=$k ONLY=$only "$here/build.sh" "$1/$k" sm_90a
    done
done
