#include "cells/pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace intactkv {

void prefer_huge_pages(ggml_backend_buffer_t buf) {
#if defined(__linux__)
    if (ggml_backend_buffer_get_type(buf) != ggml_backend_cpu_buffer_type()) {
        return;
    }
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    const uintptr_t base = (uintptr_t) ggml_backend_buffer_get_base(buf);
    const uintptr_t from = (base + page - 1) / page * page;
    const uintptr_t to = (base + ggml_backend_buffer_get_size(buf)) / page * page;
    if (from < to) {
        madvise((void *) from, to - from, MADV_HUGEPAGE); // a kernel without them says no, and nothing changes
    }
#else
    (void) buf;
#endif
}

} // namespace intactkv
