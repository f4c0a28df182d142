#!/bin/sh
# Builds every instance for the architectures given (default sm_90a) into one fatbin: build.sh OUT_DIR [arch...].
# MUTANT=k builds seeded bug k; JOBS compilers run at a time; ONLY is a pattern of instance files.
set -e
here=$(cd "$(dirname "$0")/.." && pwd)
out=$1
shift
archs=${*:-sm_90a}
gencode=
for arch in $archs; do
    number=${arch#sm_}
    gencode="$gencode -gencode=arch=compute_$number,code=sm_$number"
done
[ -n "$PTX" ] && gencode="$gencode -gencode=arch=compute_$PTX,code=compute_$PTX"
mkdir -p "$out"
for file in "$here"/instances/${ONLY:-*}.cu; do
    echo "nvcc -std=c++17 -O3 -Xptxas -v -DKV8_MUTANT=${MUTANT:-0} $gencode -fatbin $file -o $out/$(basename "$file" .cu).fatbin > $out/$(basename "$file" .cu).log 2>&1 || { cat $out/$(basename "$file" .cu).log; exit 255; }"
done | xargs -P "${JOBS:-2}" -I{} sh -c '{}'
cat "$out"/*.log | awk '
    /Compiling entry function/ { split($0, part, "\047"); name = part[2]; arch = part[4]; spill = "" }
    /bytes stack frame/ && name != "" && spill == "" { spill = "stack " $1 " spill " $5 + $9 }
    /Used [0-9]+ registers/ && name != "" { for (i = 1; i < NF; ++i) if ($i == "Used") print name, arch, spill, "registers", $(i + 1); name = "" }
' | sort > "$out/registers.txt"
