// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_SHARES(kv8_shares_d128_gw_sx_n1, 76928, 2, 128, kv8::Groups::kWhole,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 2)
