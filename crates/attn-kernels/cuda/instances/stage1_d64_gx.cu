// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d64_gx_sx_n1, 62592, 3, 64, kv8::Groups::kAny,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 4)

KV8_STAGE1(kv8_stage1_d64_gx_sx_n1_f32, 62592, 1, 64, kv8::Groups::kAny,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kF32, 4)
