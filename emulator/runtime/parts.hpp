// Memory in parts that cannot run into each other.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace kv8::emulated {

// Memory for the stacks of threads or the shared memory of blocks: parts of equal size, each followed by pages that may not be touched.
class Parts {
  public:
    ~Parts() { release(); }

    void make(size_t num, size_t bytes) {
        if (num <= num_ && bytes == bytes_) return;
        release();
        page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        num_ = num, bytes_ = bytes;
        pitch_ = (bytes + page_ - 1) / page_ * page_ + page_;
        base_ = mmap(nullptr, num * pitch_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base_ == MAP_FAILED) std::abort();
        for (size_t i = 0; i <= num; ++i) mprotect(static_cast<uint8_t*>(base_) + i * pitch_, page_, PROT_NONE);
    }

    // Ends where the forbidden pages begin.
    uint8_t* at(size_t idx) const { return static_cast<uint8_t*>(base_) + (idx + 1) * pitch_ - bytes_; }

  private:
    void release() {
        if (base_ != nullptr) munmap(base_, num_ * pitch_ + page_);
        base_ = nullptr;
        num_ = bytes_ = 0;
    }

    void* base_ = nullptr;
    size_t num_ = 0, bytes_ = 0, pitch_ = 0, page_ = 0;
};

}  // namespace kv8::emulated
