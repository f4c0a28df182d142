//! The symbols themselves: a few instructions each, and the one slow path that they share.
//!
//! Fast path: load the slot's target, jump to it. Arguments stay where the caller put them, in registers or on the
//! stack, so one form serves every signature. Slow path (target still null): save all argument registers, call
//! [`resolve_slot`], restore them, jump to the address that it returned.

use crate::resolve::{Slot, resolve_slot};
use crate::symbols::for_each_driver_symbol;

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    // System V: r11 and rax are free at a function's entry; rdi rsi rdx rcx r8 r9 and xmm0-7 may hold arguments.
    // rax is kept all the same. In: r11 = slot. The stack is 8 mod 16 at entry, and 16-aligned after `push rbp`.
    ".pushsection .text.kv8_cuda_resolve,\"ax\",@progbits",
    ".p2align 4",
    ".hidden kv8_cuda_resolve",
    ".globl kv8_cuda_resolve",
    ".type kv8_cuda_resolve,@function",
    "kv8_cuda_resolve:",
    ".cfi_startproc",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "sub rsp, 192",
    "mov [rsp], rdi",
    "mov [rsp + 8], rsi",
    "mov [rsp + 16], rdx",
    "mov [rsp + 24], rcx",
    "mov [rsp + 32], r8",
    "mov [rsp + 40], r9",
    "mov [rsp + 48], rax",
    "movups [rsp + 64], xmm0",
    "movups [rsp + 80], xmm1",
    "movups [rsp + 96], xmm2",
    "movups [rsp + 112], xmm3",
    "movups [rsp + 128], xmm4",
    "movups [rsp + 144], xmm5",
    "movups [rsp + 160], xmm6",
    "movups [rsp + 176], xmm7",
    "mov rdi, r11",
    "call {resolve_slot}",
    "mov r11, rax",
    "mov rdi, [rsp]",
    "mov rsi, [rsp + 8]",
    "mov rdx, [rsp + 16]",
    "mov rcx, [rsp + 24]",
    "mov r8, [rsp + 32]",
    "mov r9, [rsp + 40]",
    "mov rax, [rsp + 48]",
    "movups xmm0, [rsp + 64]",
    "movups xmm1, [rsp + 80]",
    "movups xmm2, [rsp + 96]",
    "movups xmm3, [rsp + 112]",
    "movups xmm4, [rsp + 128]",
    "movups xmm5, [rsp + 144]",
    "movups xmm6, [rsp + 160]",
    "movups xmm7, [rsp + 176]",
    "leave",
    ".cfi_def_cfa rsp, 8",
    "jmp r11",
    ".cfi_endproc",
    ".size kv8_cuda_resolve, . - kv8_cuda_resolve",
    ".popsection",
    resolve_slot = sym resolve_slot,
);

#[cfg(target_arch = "aarch64")]
core::arch::global_asm!(
    // AAPCS64: x16 and x17 are free at a function's entry; x0-x7, x8 and q0-q7 may hold arguments. In: x17 = slot.
    ".pushsection .text.kv8_cuda_resolve,\"ax\",@progbits",
    ".p2align 2",
    ".hidden kv8_cuda_resolve",
    ".globl kv8_cuda_resolve",
    ".type kv8_cuda_resolve,@function",
    "kv8_cuda_resolve:",
    ".cfi_startproc",
    "stp x29, x30, [sp, #-224]!",
    ".cfi_def_cfa_offset 224",
    ".cfi_offset x29, -224",
    ".cfi_offset x30, -216",
    "mov x29, sp",
    "stp x0, x1, [sp, #16]",
    "stp x2, x3, [sp, #32]",
    "stp x4, x5, [sp, #48]",
    "stp x6, x7, [sp, #64]",
    "str x8, [sp, #80]",
    "stp q0, q1, [sp, #96]",
    "stp q2, q3, [sp, #128]",
    "stp q4, q5, [sp, #160]",
    "stp q6, q7, [sp, #192]",
    "mov x0, x17",
    "bl {resolve_slot}",
    "mov x16, x0",
    "ldp x0, x1, [sp, #16]",
    "ldp x2, x3, [sp, #32]",
    "ldp x4, x5, [sp, #48]",
    "ldp x6, x7, [sp, #64]",
    "ldr x8, [sp, #80]",
    "ldp q0, q1, [sp, #96]",
    "ldp q2, q3, [sp, #128]",
    "ldp q4, q5, [sp, #160]",
    "ldp q6, q7, [sp, #192]",
    "ldp x29, x30, [sp], #224",
    ".cfi_def_cfa_offset 0",
    "br x16",
    ".cfi_endproc",
    ".size kv8_cuda_resolve, . - kv8_cuda_resolve",
    ".popsection",
    resolve_slot = sym resolve_slot,
);

macro_rules! define_trampolines {
    ($($name:ident)*) => {
        /// The names, in the order of the list.
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        /// One slot a symbol, named like it.
        #[allow(non_upper_case_globals, reason = "the names are the driver's")]
        mod slots {
            $(
                pub static $name: super::Slot = super::Slot::new(
                    match core::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                        Ok(name) => name,
                        Err(_) => c"",
                    },
                );
            )*
        }

        // One block for all of them: it lands in one object file, so a linker that reads archives once (bfd)
        // has taken every symbol as soon as it needs any.
        #[cfg(target_arch = "x86_64")]
        core::arch::global_asm!(
            $(
                concat!(".pushsection .text.kv8_", stringify!($name), ",\"ax\",@progbits"),
                ".p2align 4",
                concat!(".hidden ", stringify!($name)),
                concat!(".globl ", stringify!($name)),
                concat!(".type ", stringify!($name), ",@function"),
                concat!(stringify!($name), ":"),
                ".cfi_startproc",
                concat!("mov r11, [rip + {", stringify!($name), "}]"),
                "test r11, r11",
                "jz 2f",
                "jmp r11",
                "2:",
                concat!("lea r11, [rip + {", stringify!($name), "}]"),
                "jmp kv8_cuda_resolve",
                ".cfi_endproc",
                concat!(".size ", stringify!($name), ", . - ", stringify!($name)),
                ".popsection",
            )*
            $($name = sym slots::$name,)*
        );

        #[cfg(target_arch = "aarch64")]
        core::arch::global_asm!(
            $(
                concat!(".pushsection .text.kv8_", stringify!($name), ",\"ax\",@progbits"),
                ".p2align 2",
                concat!(".hidden ", stringify!($name)),
                concat!(".globl ", stringify!($name)),
                concat!(".type ", stringify!($name), ",@function"),
                concat!(stringify!($name), ":"),
                ".cfi_startproc",
                concat!("adrp x17, {", stringify!($name), "}"),
                concat!("add x17, x17, :lo12:{", stringify!($name), "}"),
                "ldr x16, [x17]",
                "cbz x16, 2f",
                "br x16",
                "2:",
                "b kv8_cuda_resolve",
                ".cfi_endproc",
                concat!(".size ", stringify!($name), ", . - ", stringify!($name)),
                ".popsection",
            )*
            $($name = sym slots::$name,)*
        );
    };
}

for_each_driver_symbol!(define_trampolines);
