// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_SHARES(kv8_shares_d128_g16_sf16_n1, 94336, 2, 128, kv8::Groups::k16Up,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 2)

KV8_SHARES(kv8_shares_d128_g16_sx_n1, 102528, 2, 128, kv8::Groups::k16Up,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 2)
