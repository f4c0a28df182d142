// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d256_gw_sx_n1, 70208, 2, 256, kv8::Groups::kWhole,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 2)
