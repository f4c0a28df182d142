// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_STAGE1(kv8_stage1_d192_gx_sx_n1, 84032, 1, 192, kv8::Groups::kAny,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kMma, 2)

KV8_STAGE1(kv8_stage1_d192_gx_sx_n1_f32, 84032, 1, 192, kv8::Groups::kAny,
           kv8::Scales::kAny, 1, kv8::Arithmetic::kF32, 2)
