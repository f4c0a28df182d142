// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_SHARES(kv8_shares_d96_g16_sf16_n1, 68736, 2, 96, kv8::Groups::k16Up,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 2)
