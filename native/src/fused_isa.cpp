// Which instruction sets this machine has, and the one that is used.

#include "fused_call.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace intactkv {

#if defined(__x86_64__)
void fused_run_avx512vnni(const fused_call &, int, int);
void fused_run_avx512(const fused_call &, int, int);
void fused_run_avx2(const fused_call &, int, int);
#elif defined(__aarch64__)
void fused_run_neon_dotprod(const fused_call &, int, int);
void fused_run_neon(const fused_call &, int, int);
#endif
void fused_run_portable(const fused_call &, int, int);

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
    int    value = 0;
    size_t size  = sizeof(value);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
#else
    return false;
#endif
}
#endif

const fused_kernel kernels[] = {
#if defined(__x86_64__)
    { "avx512vnni",   has_avx512vnni, fused_run_avx512vnni   },
    { "avx512",       has_avx512,     fused_run_avx512       },
    { "avx2",         has_avx2,       fused_run_avx2         },
#elif defined(__aarch64__)
    { "neon-dotprod", has_dotprod,    fused_run_neon_dotprod },
    { "neon",         always,         fused_run_neon         },
#endif
    { "portable",     always,         fused_run_portable     },
};

const fused_kernel * find(const char * isa) {
    for (const fused_kernel & k : kernels) {
        if (k.available() && (!isa || !*isa || strcmp(isa, k.isa) == 0)) {
            return &k;
        }
    }
    return nullptr;
}

std::atomic<const fused_kernel *> chosen = nullptr;

} // namespace

bool fused_choose(const char * isa) {
    const fused_kernel * k = find(isa);
    if (k) {
        chosen.store(k);
    }
    return k != nullptr;
}

const fused_kernel & fused_chosen() {
    const fused_kernel * k = chosen.load(std::memory_order_relaxed);
    if (!k) {
        k = find(getenv("INTACTKV_ISA"));
        if (!k) {
            k = find(nullptr); // the name is unknown, or this machine has not got it
        }
        chosen.store(k, std::memory_order_relaxed);
    }
    return *k;
}

} // namespace intactkv
