// The switch from one fiber to another, for each architecture.
#include "fiber.hpp"

#include <cstdint>

namespace kv8::emulated {

// Saves what the calling convention lets a callee keep, and nothing else: swapcontext(3) would ask the system at every switch.
#if defined(__x86_64__)
asm(R"(
.text
.globl kv8_switch_fiber
.type kv8_switch_fiber, @function
kv8_switch_fiber:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kv8_switch_fiber, . - kv8_switch_fiber
)");

Fiber make_fiber(void* bottom, std::size_t bytes, void (*entry)()) {
    const uintptr_t top = (reinterpret_cast<uintptr_t>(bottom) + bytes) & ~uintptr_t{15};
    void** stack = reinterpret_cast<void**>(top);
    *--stack = nullptr;  // where a return address would lie: `entry` finds the stack aligned as after a call
    *--stack = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--stack = nullptr;
    return stack;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl kv8_switch_fiber
.type kv8_switch_fiber, %function
kv8_switch_fiber:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size kv8_switch_fiber, . - kv8_switch_fiber
)");

Fiber make_fiber(void* bottom, std::size_t bytes, void (*entry)()) {
    const uintptr_t top = (reinterpret_cast<uintptr_t>(bottom) + bytes) & ~uintptr_t{15};
    void** stack = reinterpret_cast<void**>(top - 160);
    for (int i = 0; i < 20; ++i) stack[i] = nullptr;
    stack[11] = reinterpret_cast<void*>(entry);  // x30
    return stack;
}
#else
#error "fibers are written for x86-64 and aarch64"
#endif

}  // namespace kv8::emulated
