// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d96_g16_sf16_n1, 62592, 3, 96, kv8::Groups::k16Up,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d96_g16_sf16_n2, 63104, 2, 96, kv8::Groups::k16Up,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d96_g16_sf16_n4, 70272, 2, 96, kv8::Groups::k16Up,
           kv8::Scales::kF16, 4, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d96_g16_sx_n1, 60000, 3, 96, kv8::Groups::k16Up,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 3)
