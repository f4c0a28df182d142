// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d192_g16_sf16_n1, 97888, 2, 192, kv8::Groups::k16Up,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_STAGE1(kv8_stage1_d192_g16_sf16_n2, 73280, 2, 192, kv8::Groups::k16Up,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 2)

KV8_STAGE1(kv8_stage1_d192_g16_sx_n1, 74816, 2, 192, kv8::Groups::k16Up,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 2)
