// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d64_g8_sf16_n1, 46208, 4, 64, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d64_g8_sf16_n2, 46720, 3, 64, kv8::Groups::k8,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d64_g8_sf16_n4, 51840, 2, 64, kv8::Groups::k8,
           kv8::Scales::kF16, 4, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d64_g8_sbf16_n1, 46208, 4, 64, kv8::Groups::k8,
           kv8::Scales::kBf16, 1, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d64_g8_sf32_n1, 62592, 3, 64, kv8::Groups::k8,
           kv8::Scales::kF32, 1, kv8::Arithmetic::kMma, 4)
