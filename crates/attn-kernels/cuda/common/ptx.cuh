// Every inline PTX of the kernels, one function an instruction. No arithmetic decisions here.
#pragma once
#include <cstdint>

namespace kv8::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Keeps a value in its register: the compiler may not work it out again inside a loop to save one.
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(uint64_t& x) { asm volatile("" : "+l"(x)); }
template <class P>
__device__ __forceinline__ void keep(const P*& x) {
    asm volatile("" : "+l"(x));
}

// A row offset that says: there is nothing to read.
constexpr uint32_t kNowhere = 0xffffffffu;

// What a copy asks the L2 to bring along from memory.
enum class Fetch { kSectors, k128 };

// Copies BYTES from global to shared memory; if `offset` is kNowhere, writes zeros and reads nothing.
template <int BYTES, Fetch FETCH = Fetch::kSectors>
__device__ __forceinline__ void cp_async(uint32_t dst, const void* src, uint32_t offset) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    if constexpr (BYTES != 16) {
        asm volatile(
            "{ .reg .pred nowhere; setp.eq.u32 nowhere, %3, 0xffffffff;\n"
            "  cp.async.ca.shared.global [%0], [%1], %2, nowhere; }" ::"r"(dst),
            "l"(src), "n"(BYTES), "r"(offset)
            : "memory");
    } else if constexpr (FETCH == Fetch::kSectors) {
        asm volatile(
            "{ .reg .pred nowhere; setp.eq.u32 nowhere, %2, 0xffffffff;\n"
            "  cp.async.cg.shared.global [%0], [%1], 16, nowhere; }" ::"r"(dst),
            "l"(src), "r"(offset)
            : "memory");
    } else {
        asm volatile(
            "{ .reg .pred nowhere; setp.eq.u32 nowhere, %2, 0xffffffff;\n"
            "  cp.async.cg.shared.global.L2::128B [%0], [%1], 16, nowhere; }" ::"r"(dst),
            "l"(src), "r"(offset)
            : "memory");
    }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Bulk copies (sm_90): one instruction of one lane moves a run of bytes and counts them on a barrier in shared memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
    if constexpr (kBulkCopies) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// Orders this thread's earlier accesses to shared memory before bulk copies that are issued after the next barrier.
__device__ __forceinline__ void fence_before_bulk_copies() {
    if constexpr (kBulkCopies) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// By one lane: arrives at the barrier, whose phase ends when `bytes` have been counted.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    if constexpr (kBulkCopies) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    }
}

// By one lane. dst, src and bytes are multiples of 16.
__device__ __forceinline__ void bulk_copy(uint32_t dst, const void* src, uint32_t bytes, uint32_t barrier) {
    if constexpr (kBulkCopies) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
            "l"(src), "r"(bytes), "r"(barrier)
            : "memory");
    }
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    if constexpr (kBulkCopies) {
        asm volatile(
            "{ .reg .pred done;\n"
            "wait%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
            "@!done bra wait%=; }" ::"r"(barrier),
            "r"(parity)
            : "memory");
    }
}

// Meets the other threads of barrier `idx` (1 to 15), `threads` in all.
__device__ __forceinline__ void meet(uint32_t idx, uint32_t threads) { asm volatile("bar.sync %0, %1;" ::"r"(idx), "r"(threads) : "memory"); }

// blockIdx.x, threadIdx.x, blockIdx.z and the number of the cluster along z, read anew at every call.
__device__ __forceinline__ uint32_t block_x() {
    uint32_t x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}
__device__ __forceinline__ uint32_t thread_x() {
    uint32_t x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}
__device__ __forceinline__ uint32_t block_z() {
    uint32_t z;
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
    return z;
}
__device__ __forceinline__ uint32_t cluster_z() {
    uint32_t z = 0;
    if constexpr (kBulkCopies) asm volatile("mov.u32 %0, %%clusterid.z;" : "=r"(z));
    return z;
}

// Clusters (sm_90): CTAs that run at once and reach each other's shared memory. Without one, a CTA is a cluster of its own.
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank = 0;
    if constexpr (kBulkCopies) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The shared address of the same place in CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t address_in(uint32_t address, uint32_t rank) {
    uint32_t there = address;
    if constexpr (kBulkCopies) asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// Makes barriers that this thread initialized known to the cluster, with the next cluster_arrive.
__device__ __forceinline__ void fence_barrier_init() {
    if constexpr (kBulkCopies) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// All threads of the cluster arrive, then wait until all have arrived. Orders nothing that was written before but barriers, by
// fence_barrier_init.
__device__ __forceinline__ void cluster_arrive() {
    if constexpr (kBulkCopies) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    if constexpr (kBulkCopies) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes to another CTA's shared memory and counts the bytes on a barrier there.
__device__ __forceinline__ void send_async(uint32_t to, const float4& x, uint32_t barrier) {
    if constexpr (kBulkCopies) {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(x.x),
                     "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
                     : "memory");
    }
}
__device__ __forceinline__ void send_async(uint32_t to, const float2& x, uint32_t barrier) {
    if constexpr (kBulkCopies) {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(x.x), "f"(x.y),
                     "r"(barrier)
                     : "memory");
    }
}

// barrier_wait for bytes that other CTAs of the cluster sent.
__device__ __forceinline__ void cluster_barrier_wait(uint32_t barrier, uint32_t parity) {
    if constexpr (kBulkCopies) {
        asm volatile(
            "{ .reg .pred done;\n"
            "wait%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra wait%=; }" ::"r"(barrier),
            "r"(parity)
            : "memory");
    }
}

// d[16 x 8] += a[16 x 16] * b[16 x 8], f16 operands, f32 accumulator.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                            uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d[16 x 8] += a[16 x 32] * b[32 x 8], signed bytes, exact 32-bit sums.
__device__ __forceinline__ void mma_16x8x32(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                            uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes from shared memory; lane i brings the address of row i % 8 of matrix i / 8 and gets, of each,
// bytes 4 * (i % 4) + {0, 1, 2, 3} of row i / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// The same, transposed in units of 16 bits: a lane gets bytes 2 * (i / 4) + {0, 1} of rows 2 * (i % 4) and 2 * (i % 4) + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&d)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// Transposes an 8 x 8 matrix of 16-bit values held two a lane. Lanes must be converged.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// 2^x, relative error at most 2^-22, subnormal results kept.
__device__ __forceinline__ float ex2_approx(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The same with results below 2^-126 flushed to zero: two instructions fewer.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2(x), absolute error at most 2^-22 for x in [1/2, 2], relative elsewhere; -inf for 0. Subnormals are taken as they are.
__device__ __forceinline__ float lg2_approx(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// (x & MASK) ^ FLIP in one instruction.
template <uint32_t MASK, uint32_t FLIP>
__device__ __forceinline__ uint32_t mask_flip(uint32_t x) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "n"(MASK), "n"(FLIP));
    return y;
}

// 1 / x, error at most 1 ulp.
__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The same for x from 2^-126 to 2^126, subnormal results taken for zero: one instruction.
__device__ __forceinline__ float rcp_approx_ftz(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// (low, high) rounded to f16, packed.
__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

__device__ __forceinline__ uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// Lets the next kernel of the stream begin (programmatic dependent launch). Nothing happens without that launch attribute.
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before has ended and its writes are visible.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings a run of bytes into the L2 and waits for nothing. src and bytes are multiples of 16.
__device__ __forceinline__ void prefetch_l2(const void* src, uint32_t bytes) {
    if constexpr (kBulkCopies) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes));
}

// The line of one address, the same way; any address of the device may be named, and is only read.
__device__ __forceinline__ void prefetch_line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Reads a word for nothing but to have it near.
__device__ __forceinline__ void touch(const uint32_t* address) {
    asm volatile("{ .reg .u32 unused; ld.global.ca.u32 unused, [%0]; }" ::"l"(address));
}

// 16 bytes that will not be read again.
__device__ __forceinline__ uint4 load_streaming(const void* src) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(src));
    return v;
}

}  // namespace kv8::ptx
