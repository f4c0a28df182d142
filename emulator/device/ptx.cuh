// Stands in the place of the kernels' common/ptx.cuh: every instruction, for the emulated GPU. Hints are nothing here.
#pragma once
#include <cstdint>
#include <cuda_fp16.h>
#include <warp_instructions.hpp>

namespace kv8::ptx {

inline uint32_t shared_address(const void* pointer) { return emulated::shared_address(pointer); }

template <class T>
inline void keep(T&) {}

constexpr uint32_t kNowhere = 0xffffffffu;

enum class Fetch { kSectors, k128 };

template <int BYTES, Fetch FETCH = Fetch::kSectors>
inline void cp_async(uint32_t dst, const void* src, uint32_t offset) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    emulated::copy_async(dst, offset == kNowhere ? nullptr : src, BYTES);
}
inline void cp_async_commit() { emulated::commit_copies(); }
template <int PENDING>
inline void cp_async_wait() {
    emulated::wait_copies(PENDING);
}

constexpr bool kBulkCopies = __CUDA_ARCH__ >= 900;

inline void barrier_init(uint32_t barrier) {
    if constexpr (kBulkCopies) emulated::init_barrier(barrier);
}
inline void fence_before_bulk_copies() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    if constexpr (kBulkCopies) emulated::expect_bytes(barrier, bytes);
}
inline void bulk_copy(uint32_t dst, const void* src, uint32_t bytes, uint32_t barrier) {
    if constexpr (kBulkCopies) emulated::copy_bulk(dst, src, bytes, barrier);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    if constexpr (kBulkCopies) emulated::wait_barrier(barrier, parity);
}

inline void meet(uint32_t idx, uint32_t threads) { emulated::meet_named(idx, threads); }

inline uint32_t block_x() { return blockIdx.x; }
inline uint32_t thread_x() { return threadIdx.x; }
inline uint32_t block_z() { return blockIdx.z; }
inline uint32_t cluster_z() { return kBulkCopies ? emulated::cluster_z() : 0; }
inline uint32_t cluster_rank() { return kBulkCopies ? emulated::current->block->rank : 0; }
inline uint32_t address_in(uint32_t address, uint32_t rank) { return kBulkCopies ? emulated::address_in(address, rank) : address; }

inline void fence_barrier_init() {}
inline void cluster_arrive() {
    if constexpr (kBulkCopies) emulated::arrive_cluster();
}
inline void cluster_wait() {
    if constexpr (kBulkCopies) emulated::wait_cluster();
}
template <class T>
inline void send_async(uint32_t to, const T& x, uint32_t barrier) {
    if constexpr (kBulkCopies) emulated::send(to, &x, sizeof x, barrier);
}
inline void cluster_barrier_wait(uint32_t barrier, uint32_t parity) { barrier_wait(barrier, parity); }

namespace detail {
template <class T>
inline void multiply(emulated::Combine combine, T (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    emulated::Operands mine{{0, 0, 0, 0, a0, a1, a2, a3, b0, b1}};
    std::memcpy(mine.words, d, sizeof d);
    const emulated::Operands got = emulated::meet_lanes(combine, ~0u, mine);
    std::memcpy(d, got.words, sizeof d);
}

inline void load(emulated::Combine combine, uint32_t (&d)[4], uint32_t address) {
    emulated::Operands mine{};
    std::memcpy(mine.words, emulated::shared_place(address, 16), 16);
    const emulated::Operands got = emulated::meet_lanes(combine, ~0u, mine);
    std::memcpy(d, got.words, sizeof d);
}

template <class Of>
inline uint32_t each_f16(uint32_t a, uint32_t b, Of of) {
    uint32_t y = 0;
    for (int i = 0; i < 32; i += 16) {
        const float x = of(__half2float({static_cast<uint16_t>(a >> i)}), __half2float({static_cast<uint16_t>(b >> i)}));
        y |= static_cast<uint32_t>(__float2half_rn(x).bits) << i;
    }
    return y;
}

inline float without_subnormals(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
}  // namespace detail

inline void mma_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    detail::multiply(emulated::mma_16x8x16, d, a0, a1, a2, a3, b0, b1);
}
inline void mma_16x8x32(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    detail::multiply(emulated::mma_16x8x32, d, a0, a1, a2, a3, b0, b1);
}
inline void load_matrices(uint32_t (&d)[4], uint32_t address) { detail::load(emulated::load_matrices, d, address); }
inline void load_transposed(uint32_t (&d)[4], uint32_t address) { detail::load(emulated::load_transposed, d, address); }
inline uint32_t transpose_8x8(uint32_t x) { return emulated::meet_lanes(emulated::transpose_8x8, ~0u, {{x}}).words[0]; }

inline float ex2_approx(float x) { return std::exp2(x); }
inline float ex2_approx_ftz(float x) { return detail::without_subnormals(std::exp2(x)); }
inline float lg2_approx(float x) { return std::log2(x); }
template <uint32_t MASK, uint32_t FLIP>
inline uint32_t mask_flip(uint32_t x) {
    return (x & MASK) ^ FLIP;
}
inline float rcp_approx(float x) { return 1.0f / x; }
inline float rcp_approx_ftz(float x) { return detail::without_subnormals(1.0f / detail::without_subnormals(x)); }
inline uint32_t pack_f16x2(float low, float high) { return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16; }
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    return detail::each_f16(a, b, [](float x, float y) { return x - y; });
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    return detail::each_f16(a, b, [](float x, float y) { return x * y; });
}

inline void launch_dependents() {}
inline void wait_for_previous() {
    if constexpr (kBulkCopies) emulated::wait_for_previous();
}
inline void prefetch_l2(const void*, uint32_t) {}
inline void prefetch_line(const void*) {}
inline void touch(const uint32_t* address) { static_cast<void>(*static_cast<const volatile uint32_t*>(address)); }
inline uint4 load_streaming(const void* src) { return *static_cast<const uint4*>(src); }

}  // namespace kv8::ptx
