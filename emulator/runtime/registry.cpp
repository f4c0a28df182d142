// The kernels by name. <kernels.inc> has a line for each, written by `cargo xtask emulate` from the table of variants.
#include "grid.hpp"

#include "../../attn-kernels/cuda/params/append.h"
#include "../../attn-kernels/cuda/params/decode.h"
#include "../../attn-kernels/cuda/params/stream.h"

using namespace kv8;

// Those of cuda/instances/common.cu, with the launch bounds that stand there.
#define COMMON_KERNEL(SYMBOL) COMMON_##SYMBOL
#define COMMON_kv8_append KERNEL(kv8_append, AppendParams, 256, 3)
#define COMMON_kv8_dequantize KERNEL(kv8_dequantize, DequantizeParams, 256, 1)
#define COMMON_kv8_stage2 KERNEL(kv8_stage2, DecodeParams, 512, 1)
#define COMMON_kv8_stream_read KERNEL(kv8_stream_read, StreamParams, 512, 1)
#define COMMON_kv8_stream_copy KERNEL(kv8_stream_copy, StreamParams, 512, 1)

#define KERNEL(SYMBOL, PARAMS, MAX_THREADS, MIN_CTAS) extern "C" void SYMBOL(const PARAMS p);
#include <kernels.inc>
#undef KERNEL

namespace kv8::emulated {

template <class Params, void (*KERNEL)(const Params)>
static void call(const void* params) {
    KERNEL(*static_cast<const Params*>(params));
}

static const Kernel kKernels[] = {
#define KERNEL(SYMBOL, PARAMS, MAX_THREADS, MIN_CTAS) {#SYMBOL, call<PARAMS, SYMBOL>, sizeof(PARAMS), MAX_THREADS, MIN_CTAS},
#include <kernels.inc>
#undef KERNEL
};

const Kernel* find_kernel(std::string_view symbol) {
    for (const Kernel& kernel : kKernels) {
        if (symbol == kernel.symbol) return &kernel;
    }
    return nullptr;
}

}  // namespace kv8::emulated
