// Reads the environment: KV8_EMULATED_SM (80, 89 or 90), KV8_EMULATED_PROCESSORS, KV8_EMULATED_MEMORY_MIB.
#include "settings.hpp"

#include <cstdio>
#include <cstdlib>

namespace kv8::emulated {
namespace {

constexpr Architecture kArchitectures[] = {
    {80, 164 << 10, 163 << 10, 2048, 32, 40 << 20, 1'410'000, 1'215'000, 5120},   // A100
    {89, 100 << 10, 99 << 10, 1536, 24, 72 << 20, 2'520'000, 10'501'000, 384},    // RTX 4090
    {90, 228 << 10, 227 << 10, 2048, 32, 50 << 20, 1'980'000, 2'619'000, 5120},   // H100
};

// What a variable says if it is a number from 1 to `most`; `otherwise` without it; 0 if it says anything else.
unsigned long number(const char* name, unsigned long otherwise, unsigned long most) {
    const char* text = std::getenv(name);
    if (text == nullptr || *text == '\0') return otherwise;
    char* end = nullptr;
    const unsigned long value = std::strtoul(text, &end, 10);
    if (*end == '\0' && value >= 1 && value <= most && *text != '-') return value;
    std::fprintf(stderr, "kv8 emulated GPU: %s=%s: not a number from 1 to %lu\n", name, text, most);
    return 0;
}

Settings read() {
    const unsigned long sm = number("KV8_EMULATED_SM", 90, 999);
    const unsigned long processors = number("KV8_EMULATED_PROCESSORS", 8, 4096);
    const unsigned long mebibytes = number("KV8_EMULATED_MEMORY_MIB", 4096, 1ul << 30);
    Settings read{nullptr, static_cast<int>(processors), size_t{mebibytes} << 20};
    if (sm == 0 || processors == 0 || mebibytes == 0) return read;
    for (const Architecture& architecture : kArchitectures) {
        if (architecture.sm == sm) read.architecture = &architecture;
    }
    if (read.architecture == nullptr) {
        std::fprintf(stderr, "kv8 emulated GPU: KV8_EMULATED_SM=%lu: there are 80, 89 and 90\n", sm);
    }
    return read;
}

}  // namespace

const Settings& settings() {
    static const Settings kRead = read();
    return kRead;
}

}  // namespace kv8::emulated
