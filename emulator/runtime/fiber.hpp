// Threads of control that hand over to each other within one thread of the system: what a CUDA thread becomes on a CPU.
#pragma once
#include <cstddef>

namespace kv8::emulated {

// The stack pointer of a fiber that does not run.
using Fiber = void*;

// Runs `to` until it switches back; where this one stood is left in `from`.
extern "C" void kv8_switch_fiber(Fiber* from, Fiber to);

// A fiber that calls `entry` on the stack [bottom, bottom + bytes) when it first runs; `entry` may not return.
Fiber make_fiber(void* bottom, std::size_t bytes, void (*entry)());

}  // namespace kv8::emulated
