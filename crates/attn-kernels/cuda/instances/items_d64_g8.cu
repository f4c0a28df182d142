// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_ITEMS(kv8_items_d64_g8_sf16_n1, 71904, 2, 64, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_ITEMS(kv8_items_d64_g8_sf16_n2, 73952, 2, 64, kv8::Groups::k8,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 3)
