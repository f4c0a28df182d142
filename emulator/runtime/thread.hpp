// What a thread of a kernel sees of the others: its warp, its block, its cluster, and copies that are on their way.
//
// Threads run one at a time and only hand over where they wait, so a result depends on the order they run in just where the kernel
// forgot to wait: that order is drawn anew for each cluster. Copies arrive at once or as late as a wait allows, drawn as well.
#pragma once
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "grid.hpp"

namespace kv8::emulated {

constexpr uint32_t kLanes = 32;

struct Index3 {
    uint32_t x, y, z;
};

// What a lane brings to, or takes from, an instruction of its whole warp.
struct Operands {
    uint32_t words[12];
};
using LaneOperands = Operands[kLanes];

// Makes the results of the lanes in `present` from what they brought.
using Combine = void (*)(const LaneOperands& brought, LaneOperands& results, uint32_t present);

// Counts arrivals; `generation` moves on when all have come.
struct Meeting {
    uint32_t generation = 0;
    uint32_t num_arrived = 0;
    uint32_t num_expected = 0;  // of a named barrier
    uint32_t any = 0;           // of what was brought
    uint32_t result = 0;
};

struct Block;
struct Cluster;

struct Warp {
    uint32_t present = 0;  // lanes that have not ended
    uint32_t arrived = 0;
    uint32_t generation = 0;
    Combine combine = nullptr;
    LaneOperands brought;
    LaneOperands results;
};

// Bytes between two places, not copied yet. A null source: zeros. `barrier`: null, or the barrier in shared memory that counts them.
struct Copy {
    uint8_t* to;
    const uint8_t* from;
    uint32_t bytes;
    uint64_t* barrier;
    uint8_t inline_bytes[16];  // of what a thread sends from its registers
};

struct Thread {
    Index3 index;
    uint32_t lane;
    Warp* warp;
    Block* block;
    Fiber fiber;
    bool has_ended;
    // Waits while (*word & mask) == value; a null word: does not wait.
    const uint32_t* word;
    uint32_t mask, value;
    uint32_t cluster_generation;
    std::vector<Copy> copies;               // by cp.async, in order
    std::vector<size_t> groups;             // where each committed group of them ends
    void reset();
};

struct Block {
    Index3 index;
    uint32_t rank;  // in the cluster
    uint32_t num_live;
    uint8_t* shared;
    std::vector<Warp> warps;
    Meeting all;
    Meeting named[16];
    Cluster* cluster;
};

// The clock of chance: a small generator, for the order of threads and of copies.
struct Chance {
    uint64_t state;
    uint32_t below(uint32_t end) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return static_cast<uint32_t>((state >> 32) * end >> 32);
    }
};

// The work that the launch overlaps with, for all of its clusters.
class Previous {
  public:
    explicit Previous(const Before& run) : run_(run), is_done_(!run) {}

    const uint32_t& is_done() const { return is_done_; }
    // Runs it unless that has been done. Answers as run_grid.
    std::string finish();

  private:
    const Before& run_;
    std::mutex lock_;
    uint32_t is_done_;
};

struct Cluster {
    Previous* previous;
    std::vector<Block> blocks;
    std::vector<Thread> threads;
    std::vector<Copy> copies;  // bulk copies, and what threads sent
    uint32_t num_live;
    Meeting all;
    uint32_t shared_bytes;
    Index3 grid, block_shape;
    Chance chance;
    uint32_t eager;  // of 4 copies how many arrive at once
    std::string problem;  // the first; nothing runs after it
};

// The thread that runs, and where its processor goes on.
extern thread_local Thread* current;

// Ends the launch: says what is wrong and where.
[[noreturn]] void fail(const std::string& what);

// Lets other threads run.
void leave_fiber();
void wait_while(const uint32_t* word, uint32_t mask, uint32_t value);
Operands meet_lanes(Combine combine, uint32_t mask, const Operands& mine);
bool meet_block(bool brought);
void meet_named(uint32_t idx, uint32_t num_threads);
void arrive_cluster();
void wait_cluster();
void wait_for_previous();

// The place of a shared address, of this block or (`anywhere`) of another of the cluster, and the address of a place of this block.
void* shared_place(uint32_t address, uint32_t bytes, bool anywhere = false);
uint32_t shared_address(const void* place);
uint8_t* dynamic_shared();
uint32_t address_in(uint32_t address, uint32_t rank);
uint32_t cluster_z();

void copy_async(uint32_t to, const void* from, uint32_t bytes);  // a null `from`: zeros
void commit_copies();
void wait_copies(size_t num_pending);

void init_barrier(uint32_t barrier);
void expect_bytes(uint32_t barrier, uint32_t bytes);
void wait_barrier(uint32_t barrier, uint32_t parity);
void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void send(uint32_t to, const void* value, uint32_t bytes, uint32_t barrier);

// For run_cluster: a thread has ended; copies that nobody has waited for yet arrive. False: there are none.
void end_thread();
bool deliver_some(Cluster& cluster);

}  // namespace kv8::emulated
