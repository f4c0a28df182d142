// Runs work in its order; which kernels are kept back is drawn by lot, so that the next one meets both: its data ready, and not yet.
#include "line.hpp"

#include <utility>

namespace kv8::emulated {

std::string Line::finish() {
    const Before kept = std::exchange(kept_, {});
    return kept ? kept() : std::string{};
}

std::string Line::add(const Context& context, const Operation& operation) {
    const bool keeps = operation.is_kernel && toss();
    // No more than one is kept: a kernel may let the next one begin only once it has itself waited for the one before it, and then the
    // next one counts on that.
    if (keeps || !operation.overlaps) {
        if (std::string wrong = finish(); !wrong.empty()) return wrong;
    }
    if (!keeps) return operation.run(context, std::exchange(kept_, {}));
    kept_ = [&context, operation] { return operation.run(context, {}); };
    return {};
}

}  // namespace kv8::emulated
