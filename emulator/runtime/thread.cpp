// Where threads wait for each other, and when copies arrive.
#include "thread.hpp"

#include <algorithm>

namespace kv8::emulated {

thread_local Thread* current = nullptr;

// Shared addresses: kWindow + offset in the thread's own block; with the rank + 1 above, in a block of the cluster.
constexpr uint32_t kWindow = 1024;
constexpr uint32_t kRankShift = 24;

void Thread::reset() {
    has_ended = false;
    word = nullptr;
    cluster_generation = 0;
    copies.clear();
    groups.clear();
}

void fail(const std::string& what) {
    Cluster& cluster = *current->block->cluster;
    if (cluster.problem.empty()) {
        const Index3 b = current->block->index, t = current->index;
        cluster.problem = what + " (block " + std::to_string(b.x) + " " + std::to_string(b.y) + " " + std::to_string(b.z) + ", thread " +
                          std::to_string(t.x) + " " + std::to_string(t.y) + ")";
    }
    static uint32_t never = 0;
    for (;;) wait_while(&never, ~0u, 0);
}

void wait_while(const uint32_t* word, uint32_t mask, uint32_t value) {
    while ((*static_cast<const volatile uint32_t*>(word) & mask) == value) {
        current->word = word, current->mask = mask, current->value = value;
        leave_fiber();
    }
    current->word = nullptr;
}

// ---- warps ----

static void combine_warp(Warp& warp) {
    warp.combine(warp.brought, warp.results, warp.arrived);
    warp.combine = nullptr;
    warp.arrived = 0;
    ++warp.generation;
}

Operands meet_lanes(Combine combine, uint32_t mask, const Operands& mine) {
    Warp& warp = *current->warp;
    const uint32_t lane = current->lane;
    if (mask != ~0u) fail("an instruction of a warp for some of its lanes, which is not emulated");
    if (warp.combine != nullptr && warp.combine != combine) fail("the lanes of a warp have come to different instructions of the warp");
    warp.combine = combine;
    warp.brought[lane] = mine;
    warp.arrived |= 1u << lane;
    if (warp.arrived == warp.present) {
        combine_warp(warp);
    } else {
        wait_while(&warp.generation, ~0u, warp.generation);
    }
    return warp.results[lane];
}

// ---- blocks and clusters ----

static void arrive(Meeting& meeting, uint32_t num_expected, uint32_t num_arriving = 1) {
    meeting.num_arrived += num_arriving;
    if (meeting.num_arrived < num_expected) return;
    meeting.result = meeting.any;
    meeting.any = 0;
    meeting.num_arrived = 0;
    ++meeting.generation;
}

bool meet_block(bool brought) {
    Block& block = *current->block;
    block.all.any |= brought;
    const uint32_t generation = block.all.generation;
    arrive(block.all, block.num_live);
    wait_while(&block.all.generation, ~0u, generation);
    return block.all.result != 0;
}

void meet_named(uint32_t idx, uint32_t num_threads) {
    if (idx == 0 || idx > 15) fail("barrier " + std::to_string(idx) + "; a block has 1 to 15");
    Meeting& meeting = current->block->named[idx];
    if (meeting.num_arrived != 0 && meeting.num_expected != num_threads) fail("barrier " + std::to_string(idx) + " for two numbers of threads");
    meeting.num_expected = num_threads;
    const uint32_t generation = meeting.generation;
    arrive(meeting, num_threads);
    wait_while(&meeting.generation, ~0u, generation);
}

void arrive_cluster() {
    Cluster& cluster = *current->block->cluster;
    current->cluster_generation = cluster.all.generation;
    arrive(cluster.all, cluster.num_live);
}

void wait_cluster() { wait_while(&current->block->cluster->all.generation, ~0u, current->cluster_generation); }

void wait_for_previous() { wait_while(&current->block->cluster->previous->is_done(), ~0u, 0); }

std::string Previous::finish() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (is_done_ != 0) return {};
    const std::string problem = run_();
    __atomic_store_n(&is_done_, 1u, __ATOMIC_RELEASE);
    return problem;
}

void end_thread() {
    Block& block = *current->block;
    Cluster& cluster = *block.cluster;
    Warp& warp = *current->warp;
    current->has_ended = true;
    warp.present &= ~(1u << current->lane);
    if (warp.present != 0 && warp.arrived == warp.present) combine_warp(warp);
    --block.num_live;
    --cluster.num_live;
    // Who has ended is waited for no longer.
    if (block.all.num_arrived != 0) arrive(block.all, block.num_live, 0);
    if (cluster.all.num_arrived != 0) arrive(cluster.all, cluster.num_live, 0);
}

// ---- shared memory ----

uint8_t* dynamic_shared() { return current->block->shared; }

void* shared_place(uint32_t address, uint32_t bytes, bool anywhere) {
    Block* block = current->block;
    const uint32_t rank = address >> kRankShift;
    if (rank != 0) {
        if (!anywhere && rank - 1 != block->rank) fail("an instruction of the block's own shared memory with an address of another block");
        if (rank > block->cluster->blocks.size()) fail("a shared address of no block of the cluster");
        block = &block->cluster->blocks[rank - 1];
        if (block->num_live == 0) fail("shared memory of a block that has ended");
    }
    const uint32_t offset = (address & ((1u << kRankShift) - 1)) - kWindow;
    const uint32_t end = block->cluster->shared_bytes;
    if (offset > end || bytes > end - offset) {
        fail("shared memory at " + std::to_string(static_cast<int32_t>(offset)) + ", " + std::to_string(bytes) + " bytes, of " + std::to_string(end));
    }
    if (bytes != 0 && (bytes & (bytes - 1)) == 0 && offset % std::min(bytes, 16u) != 0) fail("a misaligned shared address");
    return block->shared + offset;
}

uint32_t shared_address(const void* place) {
    const Block& block = *current->block;
    const ptrdiff_t offset = static_cast<const uint8_t*>(place) - block.shared;
    if (offset < 0 || offset > static_cast<ptrdiff_t>(block.cluster->shared_bytes)) fail("the shared address of what lies elsewhere");
    return kWindow + static_cast<uint32_t>(offset);
}

uint32_t address_in(uint32_t address, uint32_t rank) {
    if (rank >= current->block->cluster->blocks.size()) fail("rank " + std::to_string(rank) + " of a smaller cluster");
    return (address & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
}

uint32_t cluster_z() { return current->block->index.z / static_cast<uint32_t>(current->block->cluster->blocks.size()); }

// ---- barriers that count bytes: bits 0 to 15 arrivals that are missing, from bit 16 on the phase; above, bytes that are missing ----

struct ByteBarrier {
    uint32_t state;
    int32_t missing_bytes;
};
static_assert(sizeof(ByteBarrier) == 8);
constexpr uint32_t kPhase = 1u << 16;

static void settle(ByteBarrier& barrier) {
    if ((barrier.state & (kPhase - 1)) == 0 && barrier.missing_bytes == 0) barrier.state += kPhase + 1;
}

static ByteBarrier& barrier_at(uint32_t address, bool anywhere = false) {
    return *static_cast<ByteBarrier*>(shared_place(address, sizeof(ByteBarrier), anywhere));
}

void init_barrier(uint32_t barrier) { barrier_at(barrier) = ByteBarrier{1, 0}; }

void expect_bytes(uint32_t address, uint32_t bytes) {
    ByteBarrier& barrier = barrier_at(address);
    if ((barrier.state & (kPhase - 1)) != 1) fail("an arrival at a barrier that expects none");
    barrier.missing_bytes += static_cast<int32_t>(bytes);
    barrier.state -= 1;
    settle(barrier);
}

void wait_barrier(uint32_t address, uint32_t parity) { wait_while(&barrier_at(address).state, kPhase, parity != 0 ? kPhase : 0); }

// ---- copies ----

static void deliver(const Copy& copy) {
    if (copy.from != nullptr) {
        std::memcpy(copy.to, copy.from, copy.bytes);
    } else if (copy.barrier != nullptr) {
        std::memcpy(copy.to, copy.inline_bytes, copy.bytes);
    } else {
        std::memset(copy.to, 0, copy.bytes);
    }
    if (copy.barrier != nullptr) {
        ByteBarrier& barrier = *reinterpret_cast<ByteBarrier*>(copy.barrier);
        barrier.missing_bytes -= static_cast<int32_t>(copy.bytes);
        settle(barrier);
    }
}

static bool is_eager(Cluster& cluster) { return cluster.chance.below(4) < cluster.eager; }

static void check_alignment(const void* from, uint32_t bytes) {
    if (reinterpret_cast<uintptr_t>(from) % bytes != 0) fail("a copy from an address that is no multiple of " + std::to_string(bytes));
}

void copy_async(uint32_t to, const void* from, uint32_t bytes) {
    Copy copy{static_cast<uint8_t*>(shared_place(to, bytes)), static_cast<const uint8_t*>(from), bytes, nullptr, {}};
    if (from != nullptr) check_alignment(from, bytes);
    if (is_eager(*current->block->cluster)) {
        deliver(copy);
    } else {
        current->copies.push_back(copy);
    }
}

void commit_copies() { current->groups.push_back(current->copies.size()); }

void wait_copies(size_t num_pending) {
    std::vector<size_t>& groups = current->groups;
    if (groups.size() <= num_pending) return;
    const size_t num_done = groups.size() - num_pending;
    const size_t end = groups[num_done - 1];
    for (size_t i = 0; i < end; ++i) deliver(current->copies[i]);
    current->copies.erase(current->copies.begin(), current->copies.begin() + static_cast<ptrdiff_t>(end));
    groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(num_done));
    for (size_t& group : groups) group -= end;
}

static void start(const Copy& copy) {
    Cluster& cluster = *current->block->cluster;
    if (is_eager(cluster)) {
        deliver(copy);
    } else {
        cluster.copies.push_back(copy);
    }
}

void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    if (bytes == 0 || bytes % 16 != 0 || to % 16 != 0) fail("a bulk copy of " + std::to_string(bytes) + " bytes; all is a multiple of 16");
    check_alignment(from, 16);
    start({static_cast<uint8_t*>(shared_place(to, bytes)), static_cast<const uint8_t*>(from), bytes, reinterpret_cast<uint64_t*>(&barrier_at(barrier)), {}});
}

void send(uint32_t to, const void* value, uint32_t bytes, uint32_t barrier) {
    Copy copy{static_cast<uint8_t*>(shared_place(to, bytes, true)), nullptr, bytes, reinterpret_cast<uint64_t*>(&barrier_at(barrier, true)), {}};
    std::memcpy(copy.inline_bytes, value, bytes);
    start(copy);
}

bool deliver_some(Cluster& cluster) {
    std::vector<Copy>& copies = cluster.copies;
    if (copies.empty()) return false;
    const uint32_t num = 1 + cluster.chance.below(static_cast<uint32_t>(copies.size()));
    for (uint32_t i = 0; i < num; ++i) {
        const uint32_t which = cluster.chance.below(static_cast<uint32_t>(copies.size()));
        const Copy copy = copies[which];
        copies[which] = copies.back();
        copies.pop_back();
        deliver(copy);
    }
    return true;
}

}  // namespace kv8::emulated
