// Written by dev/instances.py from instances.toml; do not edit.
#include "../decode/kernels.cuh"

KV8_READER(kv8_reader_d64_g8_sf16, 46208, 4, 64, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 4)

KV8_READER(kv8_reader_d96_g8_sf16, 61024, 3, 96, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_READER(kv8_reader_d128_g8_sf16, 67168, 3, 128, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_READER(kv8_reader_d128_g16_sf16, 66144, 3, 128, kv8::Groups::k16Up,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_READER(kv8_reader_d192_g8_sf16, 98912, 2, 192, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 3)

KV8_READER(kv8_reader_d256_g8_sf16, 89152, 2, 256, kv8::Groups::k8,
           kv8::Scales::kF16, 1, kv8::Arithmetic::kMma, 2)
