// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d128_g16_sf16_n1, 66144, 3, 128, kv8::Groups::k16Up,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_STAGE1(kv8_stage1_d128_g16_sf16_n2, 87680, 2, 128, kv8::Groups::k16Up,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d128_g16_sf16_n4, 77920, 2, 128, kv8::Groups::k16Up,
           kv8::Scales::kF16, 4, kv8::Arithmetic::kMma, 3)

KV8_STAGE1(kv8_stage1_d128_g16_sx_n1, 72288, 3, 128, kv8::Groups::k16Up,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 3)
