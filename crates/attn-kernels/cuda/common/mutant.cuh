// Seeded bugs for testing the tests: -DKV8_MUTANT=k builds bug k of mutants.md; 0 is the true kernel.
#pragma once

#ifndef KV8_MUTANT
#define KV8_MUTANT 0
#endif

namespace kv8 {
__host__ __device__ constexpr bool mutant(int k) { return KV8_MUTANT == k; }
}  // namespace kv8
