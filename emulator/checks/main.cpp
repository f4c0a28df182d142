// What the emulated GPU has to find: kernels with a mistake each, and their right twins, which have to pass.
//
// Grid: given with each case; block: one warp unless said. `out` is what a kernel answers.
#include <cstdio>
#include <functional>

#include "../device/ptx.cuh"

using namespace kv8;

namespace {

struct Params {
    uint32_t* out;      // [32]
    const uint32_t* in;  // [32], its own lane's number + 1 each
    bool is_right;
};

using Body = void (*)(const Params&);

// Lane i reads what lane i + 1 has written.
void neighbour(const Params& p) {
    uint32_t* const shared = reinterpret_cast<uint32_t*>(emulated::dynamic_shared());
    shared[threadIdx.x] = p.in[threadIdx.x];
    if (p.is_right) __syncwarp();
    p.out[threadIdx.x] = shared[(threadIdx.x + 1) % 32];
}

// A stage is read when its copy has been waited for, by all.
void stage(const Params& p) {
    uint8_t* const shared = emulated::dynamic_shared();
    ptx::cp_async<4>(ptx::shared_address(shared + 4 * threadIdx.x), p.in + threadIdx.x, 0);
    ptx::cp_async_commit();
    if (p.is_right) ptx::cp_async_wait<0>();
    __syncwarp();
    p.out[threadIdx.x] = reinterpret_cast<uint32_t*>(shared)[(threadIdx.x + 1) % 32];
}

// The same by a bulk copy of one lane.
void run(const Params& p) {
    uint8_t* const shared = emulated::dynamic_shared();
    const uint32_t barrier = ptx::shared_address(shared + 128);
    if (threadIdx.x == 0) {
        ptx::barrier_init(barrier);
        ptx::barrier_expect(barrier, 128);
        ptx::bulk_copy(ptx::shared_address(shared), p.in, 128, barrier);
    }
    __syncwarp();
    if (p.is_right) ptx::barrier_wait(barrier, 0);
    p.out[threadIdx.x] = reinterpret_cast<uint32_t*>(shared)[(threadIdx.x + 1) % 32];
    __syncwarp();
    ptx::barrier_wait(barrier, 0);
}

// A stage is filled again when all have read it.
void refill(const Params& p) {
    uint8_t* const shared = emulated::dynamic_shared();
    const uint32_t own = ptx::shared_address(shared + 4 * threadIdx.x);
    ptx::cp_async<4>(own, p.in + threadIdx.x, 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    const uint32_t read = reinterpret_cast<uint32_t*>(shared)[(threadIdx.x + 1) % 32];
    if (p.is_right) __syncwarp();
    ptx::cp_async<4>(own, p.in, 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    p.out[threadIdx.x] = read;
}

// The second block of a cluster gets what the first has sent.
void sent(const Params& p) {
    uint8_t* const shared = emulated::dynamic_shared();
    const uint32_t barrier = ptx::shared_address(shared + 256);
    if (threadIdx.x == 0) {
        ptx::barrier_init(barrier);
        ptx::barrier_expect(barrier, 32 * 8);
    }
    ptx::fence_barrier_init();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    const float x = static_cast<float>(p.in[threadIdx.x]);
    const uint32_t there = ptx::address_in(ptx::shared_address(shared + 8 * threadIdx.x), 1 - ptx::cluster_rank());
    ptx::send_async(there, make_float2(x, x), ptx::address_in(barrier, 1 - ptx::cluster_rank()));
    if (p.is_right) ptx::cluster_barrier_wait(barrier, 0);
    const float got = reinterpret_cast<const float2*>(shared)[(threadIdx.x + 1) % 32].x;
    if (ptx::cluster_rank() == 1) p.out[threadIdx.x] = static_cast<uint32_t>(got);
    ptx::cluster_barrier_wait(barrier, 0);
}

// Reads what the kernel before writes, once that has ended.
void after(const Params& p) {
    if (p.is_right) ptx::wait_for_previous();
    const uint32_t read = p.in[(threadIdx.x + 1) % 32];
    ptx::wait_for_previous();
    p.out[threadIdx.x] = read;
}

// The mistakes below end a launch by themselves.
void never_arrives(const Params& p) {
    if (p.is_right || threadIdx.x != 0) __syncwarp();
    if (p.is_right) return neighbour({p.out, p.in, true});
    if (threadIdx.x == 0) ptx::meet(1, 64);
}

void two_instructions(const Params& p) {
    if (!p.is_right && threadIdx.x % 2 != 0) {
        __shfl_sync(~0u, 1u, 0);
    } else {
        __ballot_sync(~0u, true);
    }
    neighbour({p.out, p.in, true});
}

void outside(const Params& p) {
    p.out[threadIdx.x] = p.in[p.is_right ? (threadIdx.x + 1) % 32 : threadIdx.x + 4096];
}

void outside_shared(const Params& p) {
    ptx::cp_async<16>(ptx::shared_address(emulated::dynamic_shared()) + (p.is_right ? 0 : 500), p.in, 0);
    neighbour({p.out, p.in, true});
}

void misaligned(const Params& p) {
    ptx::cp_async<16>(ptx::shared_address(emulated::dynamic_shared()), p.in + (p.is_right ? 0 : 1), 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    neighbour({p.out, p.in, true});
}

void unfinished(const Params& p) {
    const uint32_t barrier = ptx::shared_address(emulated::dynamic_shared() + 128);
    if (threadIdx.x == 0) {
        ptx::barrier_init(barrier);
        ptx::barrier_expect(barrier, 128);
        ptx::bulk_copy(ptx::shared_address(emulated::dynamic_shared() + 256), p.in, 128, barrier);
        if (p.is_right) ptx::barrier_wait(barrier, 0);
    }
    neighbour({p.out, p.in, true});
}

struct Case {
    const char* name;
    Body body;
    uint32_t cluster;
    bool has_before;     // a kernel before it writes `in`
    const char* problem;  // how the launch of the mistake ends; nullptr: with wrong numbers
};

const Case kCases[] = {
    {"a lane that does not wait for its neighbour", neighbour, 1, false, nullptr},
    {"a stage that is read before its copy has come", stage, 1, false, nullptr},
    {"a bulk copy that is read before it has come", run, 1, false, nullptr},
    {"a stage that is filled before it has been read", refill, 1, false, nullptr},
    {"a message of the cluster that is read before it has come", sent, 2, false, nullptr},
    {"a read of what the kernel before has not written yet", after, 1, true, nullptr},
    {"a barrier that not all reach", never_arrives, 1, false, "threads wait for what never comes"},
    {"lanes at two instructions of a warp", two_instructions, 1, false, "different instructions of the warp"},
    {"an access outside of memory", outside, 1, false, "an access outside of memory"},
    {"a copy beyond shared memory", outside_shared, 1, false, "shared memory at 500"},
    {"a misaligned copy", misaligned, 1, false, "no multiple of 16"},
    {"a bulk copy that nobody waits for", unfinished, 1, false, "still under way"},
};

Body body = nullptr;
void call(const void* params) { body(*static_cast<const Params*>(params)); }

// How often of `num_runs` launches the answer was wrong or there was none, and the last problem.
uint32_t failures(const Case& what, bool is_right, uint32_t num_runs, std::string& problem) {
    uint32_t num = 0;
    for (uint32_t i = 0; i < num_runs; ++i) {
        const auto in = reinterpret_cast<uint32_t*>(emulated::allocate(128));
        const auto out = reinterpret_cast<uint32_t*>(emulated::allocate(128));
        const auto write = [&]() -> std::string {
            for (uint32_t lane = 0; lane < 32; ++lane) in[lane] = lane + 1;
            return {};
        };
        if (!what.has_before) write();
        body = what.body;
        const Params params{out, in, is_right};
        const emulated::Kernel kernel{what.name, call, sizeof params, 32, 1};
        const emulated::GridShape shape{{1, 1, what.cluster}, {32, 1, 1}, what.cluster, 512};
        const std::string found = emulated::run_grid(kernel, shape, &params, what.has_before ? emulated::Before(write) : emulated::Before());
        bool is_wrong = !found.empty();
        for (uint32_t lane = 0; lane < 32; ++lane) is_wrong |= out[lane] != (lane + 1) % 32 + 1;
        num += is_wrong;
        if (!found.empty()) problem = found;
        emulated::release(reinterpret_cast<uint64_t>(in));
        emulated::release(reinterpret_cast<uint64_t>(out));
    }
    return num;
}

}  // namespace

int main() {
    constexpr uint32_t kRuns = 64;
    uint32_t num_bad = 0;
    for (const Case& what : kCases) {
        std::string problem;
        const uint32_t right = failures(what, true, kRuns, problem);
        const std::string of_right = problem;
        const uint32_t wrong = failures(what, false, kRuns, problem);
        const bool is_said = what.problem == nullptr || problem.find(what.problem) != std::string::npos;
        // Half of the launches: how copies arrive is drawn for each.
        const bool is_good = right == 0 && wrong >= kRuns / 4 && is_said;
        num_bad += !is_good;
        std::printf("%s %s: found in %u of %u launches%s%s; without it %u fail%s%s\n", is_good ? "ok  " : "FAIL", what.name, wrong, kRuns,
                    problem.empty() ? "" : ", as: ", problem.c_str(), right, of_right.empty() ? "" : ": ", of_right.c_str());
    }
    return num_bad == 0 ? 0 : 1;
}
