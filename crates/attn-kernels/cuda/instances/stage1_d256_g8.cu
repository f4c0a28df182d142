// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d256_g8_sf16_n1, 89152, 2, 256, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 2)

KV8_STAGE1(kv8_stage1_d256_g8_sf16_n2, 97856, 2, 256, kv8::Groups::k8,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 2)

KV8_STAGE1(kv8_stage1_d256_g8_sbf16_n1, 89152, 2, 256, kv8::Groups::k8,
           kv8::Scales::kBf16, 1, kv8::Arithmetic::kMma, 2)

KV8_STAGE1(kv8_stage1_d256_g8_sf32_n1, 155232, 1, 256, kv8::Groups::k8,
           kv8::Scales::kF32, 1, kv8::Arithmetic::kMma, 3)
