// The order of a stream, or of a graph's launch. One kernel may be kept back until it is known whether the next overlaps with it.
#pragma once
#include <functional>
#include <string>

#include "../runtime/grid.hpp"

namespace kv8::emulated {

struct Context;

// One piece of device work with copies of its arguments, runnable any number of times.
struct Operation {
    // Empty on success, else what went wrong. The work that it overlaps with may be empty.
    std::function<std::string(const Context&, const Before&)> run;
    bool is_kernel;
    bool overlaps;  // programmatic dependent launch: it waits for the kernel before it by itself
};

class Line {
public:
    // Runs the operation after all that were added before, or keeps it back. Answers what went wrong with what has run.
    std::string add(const Context& context, const Operation& operation);
    // Runs what was kept back.
    std::string finish();

private:
    Before kept_;  // empty: nothing is
};

}  // namespace kv8::emulated
