// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d128_gw_sx_n1, 74368, 3, 128, kv8::Groups::kWhole,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d128_gw_sx_n2, 74880, 2, 128, kv8::Groups::kWhole,
           kv8::Scales::kAny, 2, kv8::Arithmetic::kMma, 4)
