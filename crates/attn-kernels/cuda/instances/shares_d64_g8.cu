// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_SHARES(kv8_shares_d64_g8_sf16_n1, 72896, 2, 64, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_SHARES(kv8_shares_d64_g8_sf16_n2, 75968, 2, 64, kv8::Groups::k8,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 3)
