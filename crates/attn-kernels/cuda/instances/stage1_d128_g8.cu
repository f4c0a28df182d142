// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d128_g8_sf16_n1, 73408, 3, 128, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_STAGE1(kv8_stage1_d128_g8_sf16_n2, 97024, 2, 128, kv8::Groups::k8,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d128_g8_sf16_n4, 83136, 2, 128, kv8::Groups::k8,
           kv8::Scales::kF16, 4, kv8::Arithmetic::kMma, 3)

KV8_STAGE1(kv8_stage1_d128_g8_sbf16_n1, 73408, 3, 128, kv8::Groups::k8,
           kv8::Scales::kBf16, 1, kv8::Arithmetic::kMma, 3)

KV8_STAGE1(kv8_stage1_d128_g8_sf32_n1, 85696, 2, 128, kv8::Groups::k8,
           kv8::Scales::kF32, 1, kv8::Arithmetic::kMma, 3)
