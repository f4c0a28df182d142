// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d128_g8_sf16_n1, 67168, 3, 128, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_STAGE1(kv8_stage1_d128_g8_sf16_n2, 88704, 2, 128, kv8::Groups::k8,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d128_g8_sf16_n4, 77920, 2, 128, kv8::Groups::k8,
           kv8::Scales::kF16, 4, kv8::Arithmetic::kMma, 3)

KV8_STAGE1(kv8_stage1_d128_g8_sbf16_n1, 67168, 3, 128, kv8::Groups::k8,
           kv8::Scales::kBf16, 1, kv8::Arithmetic::kMma, 3)

KV8_STAGE1(kv8_stage1_d128_g8_sf32_n1, 79456, 2, 128, kv8::Groups::k8,
           kv8::Scales::kF32, 1, kv8::Arithmetic::kMma, 3)
