// Rows of tensors that may be in the memory of a GPU or of another machine: neighbours go in one transfer, as each
// transfer waits for the device or for the network.

#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace intactkv {

// f(first of a run of neighbours in `rows`, its length)
template <typename T, typename F> void each_run(const std::vector<T> & rows, F f) {
    for (size_t i = 0; i < rows.size();) {
        size_t end = i + 1;
        while (end < rows.size() && rows[end] == rows[end - 1] + 1) {
            ++end;
        }
        f(i, end - i);
        i = end;
    }
}

// out: [rows.size()] rows of t, as they are there
template <typename T> void get_rows(const ggml_tensor * t, const std::vector<T> & rows, std::vector<uint8_t> & out) {
    const size_t size = ggml_row_size(t->type, t->ne[0]);
    out.resize(rows.size() * size);
    each_run(rows,
            [&](size_t i, size_t n) { ggml_backend_tensor_get(t, out.data() + i * size, rows[i] * size, n * size); });
}

template <typename T> void set_rows(ggml_tensor * t, const std::vector<T> & rows, const uint8_t * data) {
    const size_t size = ggml_row_size(t->type, t->ne[0]);
    each_run(rows, [&](size_t i, size_t n) { ggml_backend_tensor_set(t, data + i * size, rows[i] * size, n * size); });
}

// within t; buf: to be used for it
template <typename T>
void copy_rows(
        ggml_tensor * t, const std::vector<T> & from, const std::vector<uint32_t> & to, std::vector<uint8_t> & buf) {
    get_rows(t, from, buf);
    set_rows(t, to, buf.data());
}

} // namespace intactkv
