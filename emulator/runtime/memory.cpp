// The device's memory. What lies behind an allocation cannot be touched, and what lies in it at first is a pattern: a kernel that reads
// too far stops, one that reads too early computes nonsense.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>

#include "grid.hpp"

namespace kv8::emulated {

constexpr size_t kAlignment = 256;
constexpr size_t kGuard = 1 << 20;  // bytes behind an allocation that may not be touched
constexpr int kPattern = 0xa5;            // as a scale or a float a large negative number, as an index out of every range
constexpr size_t kMostPatterned = 64 << 20;  // larger allocations stay zeros: to write them would make them real

namespace {
struct Mapping {
    void* base;
    size_t bytes;
};
std::mutex g_lock;
std::map<uint64_t, Mapping> g_mappings;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }
}  // namespace

uint64_t allocate(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = round_up(bytes, kAlignment);
    const size_t mapped = round_up(used, page);
    void* base = mmap(nullptr, mapped + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return 0;
    mprotect(static_cast<uint8_t*>(base) + mapped, kGuard, PROT_NONE);
    uint8_t* const first = static_cast<uint8_t*>(base) + (mapped - used);
    if (used <= kMostPatterned) std::memset(first, kPattern, used);
    const uint64_t address = reinterpret_cast<uint64_t>(first);
    const std::lock_guard<std::mutex> guard(g_lock);
    g_mappings[address] = {base, mapped + kGuard};
    return address;
}

bool release(uint64_t address) {
    const std::lock_guard<std::mutex> guard(g_lock);
    const auto found = g_mappings.find(address);
    if (found == g_mappings.end()) return false;
    munmap(found->second.base, found->second.bytes);
    g_mappings.erase(found);
    return true;
}

}  // namespace kv8::emulated
