// Which instruction sets this machine has, and the one that is used.

#include "attention/targets/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace intactkv {

namespace {

bool always() {
    return true;
}

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    constexpr unsigned long hwcap_asimddp = 1ul << 20;
    return getauxval(AT_HWCAP) & hwcap_asimddp;
#elif defined(__APPLE__)
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
#else
    return false;
#endif
}
#endif

const struct {
    bool (*available)();
    const fused_target & target;
} targets[] = {
#if defined(__x86_64__)
    { has_avx512vnni, fused_avx512vnni },
    { has_avx512, fused_avx512 },
    { has_avx2, fused_avx2 },
#elif defined(__aarch64__)
    { has_dotprod, fused_neon_dotprod },
    { always, fused_neon },
#endif
    { always, fused_portable },
};

const fused_target * find(const char * isa) {
    for (const auto & [available, target] : targets) {
        if (available() && (!isa || !*isa || strcmp(isa, target.isa) == 0)) {
            return &target;
        }
    }
    return nullptr;
}

std::atomic<const fused_target *> chosen = nullptr;

} // namespace

bool fused_choose(const char * isa) {
    const fused_target * t = find(isa);
    if (t) {
        chosen.store(t);
    }
    return t != nullptr;
}

const fused_target & fused_chosen() {
    const fused_target * t = chosen.load(std::memory_order_relaxed);
    if (!t) {
        t = find(getenv("INTACTKV_ISA"));
        if (!t) {
            t = find(nullptr); // the name is unknown, or this machine has not got it
        }
        chosen.store(t, std::memory_order_relaxed);
    }
    return *t;
}

const char * fused_isa() {
    return fused_chosen().isa;
}

} // namespace intactkv
