"""Writes instances/*.cu from instances.toml, so that files compile in parallel; `--table` rewrites the table's shared_bytes.

The shared memory of a variant is worked out here as in decode/traits.cuh; the compiler checks that both agree.
"""

import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT.parent / "instances.toml"
GROUPS = {"g8": "k8", "g16": "k16Up", "gx": "kAny", "gw": "kWhole"}
SCALES = {"sf16": "kF16", "sbf16": "kBf16", "sf32": "kF32", "sx": "kAny"}


def round_up(x, unit):
    return (x + unit - 1) // unit * unit


def query_in_shared(row):
    tiles, steps = row["row_tiles"], row["head_dim"] // 16
    return row["arithmetic"] == "mma" and (tiles * steps * 2 > 32 or tiles == 4)


def wide_bytes(row):
    """Of a block of eight warps, as in decode/wide.cuh; of its own: shares.cuh, items.cuh."""
    d, tiles = row["head_dim"], row["row_tiles"]
    query = 0 if row["groups"] == "gw" else d // 16 * tiles * 256
    rows = 8 * tiles
    own = rows * (d // 4) * 8 if row["kernel"] == "shares" else 32
    return round_up(8 * warp_bytes(row) + 8 * rows * 16 + query + own + 8 * row["stages"] * 8, 16)


def warp_bytes(row):
    d, stages = row["head_dim"], row["stages"]
    packed, whole = row["groups"] == "g8", row["groups"] == "gw"
    groups = d // {"g16": 16, "gw": d}.get(row["groups"], 8)
    raw = groups * (4 if row["scales"] in ("sf32", "sx") else 2)
    pitch = round_up(d + raw + (0 if packed else 4), 16)
    pitch += 16 if pitch // 16 % 2 == 0 else 0
    plane = 16 * (d + round_up(raw + (0 if packed else 4), 8 if whole else 16)) if d % 128 == 0 else 16 * pitch
    run = 2 * 16 * round_up(d + raw, 16)
    stage = round_up(max(round_up(plane, 128) + plane + 16 + 64, run), 128)
    return round_up(stages * stage + (0 if whole else 16 * (round_up(groups * 2, 16) + 16) + 64), 128)


def shared_bytes(row):
    if row["kernel"] in ("shares", "items"):
        return wide_bytes(row)
    d, tiles, stages = row["head_dim"], row["row_tiles"], row["stages"]
    query = d // 16 * tiles * 256 if query_in_shared(row) else 0
    barriers = 4 * stages * 8
    merge = 4 * 8 * tiles * (d + 4) * 4
    return max(4 * warp_bytes(row), merge) + 4 * 8 * tiles * 16 + query + barriers


def symbol(row):
    if row["kernel"] == "reader":
        return f"kv8_reader_d{row['head_dim']}_{row['groups']}_{row['scales']}"
    suffix = "" if row["arithmetic"] == "mma" else "_f32"
    return f"kv8_{row['kernel']}_d{row['head_dim']}_{row['groups']}_{row['scales']}_n{row['row_tiles']}{suffix}"


def instance(row):
    macro = {"reader": "KV8_READER", "stage1": "KV8_STAGE1", "shares": "KV8_SHARES", "items": "KV8_ITEMS"}[row["kernel"]]
    arithmetic = "kMma" if row["arithmetic"] == "mma" else "kF32"
    return (
        f"{macro}({symbol(row)}, {row['shared_bytes']}, {row['min_ctas']}, {row['head_dim']}, kv8::Groups::{GROUPS[row['groups']]},\n"
        f"           kv8::Scales::{SCALES[row['scales']]}, {row['row_tiles']}, kv8::Arithmetic::{arithmetic}, {row['stages']})\n"
    )


def file_name(row):
    if row["kernel"] == "reader":
        return "reader.cu"
    return f"{row['kernel']}_d{row['head_dim']}_{row['groups']}.cu"


def main():
    rows = tomllib.loads(TABLE.read_text())["instance"]
    if "--table" in sys.argv:
        wanted = iter(rows)
        lines = []
        for line in TABLE.read_text().splitlines():
            if line.startswith("shared_bytes"):
                line = f"shared_bytes = {shared_bytes(next(wanted))}"
            lines.append(line)
        TABLE.write_text("\n".join(lines) + "\n")
        rows = tomllib.loads(TABLE.read_text())["instance"]
    files = {}
    for row in rows:
        files.setdefault(file_name(row), []).append(row)
    for stale in (ROOT / "instances").glob("*.cu"):
        if stale.name != "common.cu" and stale.name not in files:
            stale.unlink()
    for name, members in files.items():
        text = "// Written by dev/instances.py from instances.toml; do not edit.\n#include \"../decode/kernels.cuh\"\n\n"
        text += "\n".join(instance(row) for row in members)
        path = ROOT / "instances" / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    main()
