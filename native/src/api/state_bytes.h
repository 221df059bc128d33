// Bytes in memory as upstream's memories read them.

#pragma once

#include "llama-io.h"

#include "ggml-backend.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace intactkv {

// Hands the bytes of a sequence's state to a memory's state_read(). Bounds are checked though the file was verified: the
// two readers must agree, and this one is next to the cache.
class state_bytes : public llama_io_read_i {
public:
    state_bytes(const uint8_t * data, size_t size) :
        data(data),
        size(size) {}

    void read(void * dst, size_t n) override {
        if (n > size - pos) {
            throw std::runtime_error("the state ends too early");
        }
        memcpy(dst, data + pos, n);
        pos += n;
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t n) override {
        if (n > size - pos) {
            throw std::runtime_error("the state ends too early");
        }
        ggml_backend_tensor_set(tensor, data + pos, offset, n);
        pos += n;
    }

    size_t n_bytes() override { return pos; }

private:
    const uint8_t * data;
    const size_t size;
    size_t pos = 0;
};

} // namespace intactkv
