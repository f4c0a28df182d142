// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_SHARES(kv8_shares_d128_g8_sf16_n1, 96384, 2, 128, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 2)

KV8_SHARES(kv8_shares_d128_g8_sbf16_n1, 96384, 2, 128, kv8::Groups::k8,
           kv8::Scales::kBf16, 1, kv8::Arithmetic::kMma, 2)
