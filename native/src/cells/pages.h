// Memory of new caches.

#pragma once

#include "ggml-backend.h"

namespace intactkv {

// Asks the system for huge pages under a new cache in CPU memory: attention reads all of it for every token, and with
// small pages the look-ups of their addresses bound it before the memory does. Linux only, elsewhere nothing happens.
void prefer_huge_pages(ggml_backend_buffer_t buf);

} // namespace intactkv
