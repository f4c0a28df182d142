// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d256_g16_sf16_n1, 83008, 2, 256, kv8::Groups::k16Up,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 2)

KV8_STAGE1(kv8_stage1_d256_g16_sf16_n2, 91712, 2, 256, kv8::Groups::k16Up,
           kv8::Scales::kF16, 2, kv8::Arithmetic::kMma, 2)

KV8_STAGE1(kv8_stage1_d256_g16_sx_n1, 91200, 2, 256, kv8::Groups::k16Up,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 2)
