// How many blocks of a kernel find room on a multiprocessor.
#pragma once
#include <cstddef>

#include "state.hpp"

namespace kv8::emulated {

// Registers of a thread: as many as a compiler may use that keeps the kernel's launch bounds.
uint32_t registers_of(const Kernel& kernel);

// 0: not one.
uint32_t blocks_per_processor(const Function& function, uint32_t block_threads, size_t dynamic_shared_bytes);

}  // namespace kv8::emulated
