// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d64_gw_sx_n1, 43648, 4, 64, kv8::Groups::kWhole,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 4)
