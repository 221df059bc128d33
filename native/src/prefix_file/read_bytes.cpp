#include "prefix_file/read_bytes.h"

#include "prefix_file/parse.h"
#include "prefix_file/refuse.h"

#include "gguf.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>

namespace intactkv {

namespace fs = std::filesystem;

static constexpr const char * STATE_KEY = "intactkv.state";
static constexpr const char * OFFSET_KEY = "intactkv.state.offset";
static constexpr const char * SIZE_KEY = "intactkv.state.size";
static constexpr const char * ALIGNMENT_KEY = "general.alignment";
static constexpr size_t LONGEST_KEY = 21;   // of these
static constexpr char IKV_MAGIC[] = "qsgg"; // the little-endian 'ggsq'

// A regular file with its size. Reading past the end is refused before anything is allocated for it.
class input {
public:
    explicit input(const char * name) :
        path(name ? name : "") {
        std::error_code error;
        const fs::path where = fs::u8path(path);
        const auto status = fs::status(where, error);
        if (error) {
            refuse("cannot read %s: %s: check the path", path, error.message().c_str());
        }
        if (!fs::is_regular_file(status)) {
            refuse("cannot read %s: it is %s, not a file: check the path", path,
                    fs::is_directory(status) ? "a directory" : "a device, pipe or socket");
        }
        size = fs::file_size(where, error);
        if (!error) {
#ifdef _WIN32
            file.reset(_wfopen(where.c_str(), L"rb"));
#else
            file.reset(fopen(path, "rb"));
#endif
        }
        if (!file) {
            const int code = errno;
            refuse("cannot read %s: %s: check its permissions", path,
                    error ? error.message().c_str() : std::generic_category().message(code).c_str());
        }
    }

    uint64_t left() const { return size - pos; }

    void read(void * out, size_t n) {
        need(n);
        errno = 0;
        const size_t got = fread(out, 1, n, file.get());
        if (got != n) {
            const int code = errno;
            refuse("cannot read %s: %zu of %zu bytes at byte %" PRIu64 " (%s): try again", path, got, n, pos,
                    code ? std::generic_category().message(code).c_str() : "the file was made shorter meanwhile");
        }
        pos += n;
    }

    template <typename T> T get() {
        T res;
        read(&res, sizeof(res));
        return res;
    }

    // Forward. Short skips are reads, which leave the buffer of the file alone.
    void skip(uint64_t n) {
        need(n);
        char ignored[512];
        if (n <= sizeof(ignored)) {
            return read(ignored, n);
        }
#ifdef _WIN32
        const int failed = _fseeki64(file.get(), pos + n, SEEK_SET);
#else
        const int failed = fseeko(file.get(), pos + n, SEEK_SET);
#endif
        if (failed) {
            refuse("cannot read %s: byte %" PRIu64 " cannot be reached: try again", path, pos + n);
        }
        pos += n;
    }

    void need(uint64_t n) const {
        if (n > left()) {
            refuse("%s is cut off or damaged: %" PRIu64 " bytes are needed at byte %" PRIu64 " and %" PRIu64
                   " are left: %s",
                    path, n, pos, left(), DOWNLOAD);
        }
    }

    const char * path;
    uint64_t pos = 0;

private:
    struct closer {
        void operator()(FILE * file) const { fclose(file); }
    };

    std::unique_ptr<FILE, closer> file;
    uint64_t size = 0;
};

static uint64_t type_size(int32_t type) {
    switch (type) {
        case GGUF_TYPE_UINT8:
        case GGUF_TYPE_INT8:
        case GGUF_TYPE_BOOL: return 1;
        case GGUF_TYPE_UINT16:
        case GGUF_TYPE_INT16: return 2;
        case GGUF_TYPE_UINT32:
        case GGUF_TYPE_INT32:
        case GGUF_TYPE_FLOAT32: return 4;
        case GGUF_TYPE_UINT64:
        case GGUF_TYPE_INT64:
        case GGUF_TYPE_FLOAT64: return 8;
        default: return 0;
    }
}

static void skip_values(input & in, int32_t type, uint64_t n) {
    if (type == GGUF_TYPE_STRING) {
        for (uint64_t i = 0; i < n; ++i) { // each takes 8 bytes or more of a finite file
            in.skip(in.get<uint64_t>());
        }
        return;
    }
    const uint64_t each = type_size(type);
    if (each == 0) {
        refuse("%s is damaged: a value before byte %" PRIu64 " has the type %" PRId32 ", which GGUF does not have: %s",
                in.path, in.pos, type, DOWNLOAD);
    }
    in.need(n > UINT64_MAX / each ? UINT64_MAX : n * each);
    in.skip(n * each);
}

static std::vector<uint8_t> read_array(input & in, int32_t type, bool is_array, uint64_t n) {
    if (!is_array || type != GGUF_TYPE_UINT8) {
        refuse("the key %s of %s is of GGUF type %" PRId32 ", not an array of type %d: embed the prefix again",
                STATE_KEY, in.path, type, GGUF_TYPE_UINT8);
    }
    in.need(n);
    std::vector<uint8_t> res(n);
    in.read(res.data(), n);
    return res;
}

template <typename T>
static T read_number(input & in, const std::string & key, int32_t type, bool is_array, int32_t wanted) {
    if (is_array || type != wanted) {
        refuse("the key %s of %s is %s GGUF type %" PRId32 ", not a number of type %" PRId32 ": embed the prefix again",
                key.c_str(), in.path, is_array ? "an array of" : "of", type, wanted);
    }
    return in.get<T>();
}

// Skips the list of tensors; returns the offset of the last one in the tensor data.
static uint64_t skip_tensors(input & in, int64_t n_tensors) {
    uint64_t last = 0;
    for (int64_t i = 0; i < n_tensors; ++i) { // each takes 24 bytes or more of a finite file
        in.skip(in.get<uint64_t>());
        in.skip(sizeof(int64_t) * uint64_t(in.get<uint32_t>()));
        in.get<int32_t>(); // type
        last = std::max(last, in.get<uint64_t>());
    }
    return last;
}

// The bytes at `offset` of the tensor data, behind the last tensor.
static std::vector<uint8_t> read_behind(
        input & in, int64_t n_tensors, uint64_t alignment, uint64_t offset, uint64_t size) {
    const uint64_t last = skip_tensors(in, n_tensors);
    if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
        refuse("%s is damaged: its alignment is %" PRIu64 ", not a power of two: %s", in.path, alignment, DOWNLOAD);
    }
    const uint64_t padding = (alignment - in.pos % alignment) % alignment;
    const uint64_t left = in.left() - std::min(in.left(), padding); // from the tensor data on
    std::vector<uint8_t> res;
    if (offset <= left && size <= left - offset && size >= 4 + TRAILER_MAGIC_SIZE &&
            (n_tensors <= 0 || offset > last)) {
        in.skip(padding + offset);
        res.resize(size);
        in.read(res.data(), size);
    }
    if (res.empty() || memcmp(res.data(), IKV_MAGIC, 4) != 0 ||
            memcmp(res.data() + size - TRAILER_MAGIC_SIZE, TRAILER_MAGIC, TRAILER_MAGIC_SIZE) != 0) {
        refuse("the prefix embedded in %s is lost: its %" PRIu64 " bytes should begin %" PRIu64
               " bytes into the %" PRIu64
               " of tensor data and do not, another program has cut or written the file: embed it again with "
               "intactkv-export embed, or get the file again",
                in.path, size, offset, left);
    }
    return res;
}

// The prefix in a GGUF whose magic was read: behind the tensors, or in files of before the array intactkv.state. Not
// with gguf_init_from_file(): that reads arrays value by value, and writes to the log what should be our one sentence.
static std::vector<uint8_t> read_embedded(input & in) {
    const auto version = in.get<uint32_t>();
    if (version < 2 || version > GGUF_VERSION) {
        refuse("%s has GGUF version %" PRIu32 " and versions 2 to %d can be read: convert the model again", in.path,
                version, GGUF_VERSION);
    }
    const auto n_tensors = in.get<int64_t>();
    const auto n_kv = in.get<uint64_t>();
    uint64_t alignment = GGUF_DEFAULT_ALIGNMENT;
    uint64_t offset = 0, size = 0;
    bool has_offset = false, has_size = false;
    for (uint64_t i = 0; i < n_kv; ++i) {
        const auto key_size = in.get<uint64_t>();
        std::string key;
        if (key_size <= LONGEST_KEY) {
            key.resize(key_size);
            in.read(&key[0], key_size);
        } else {
            in.skip(key_size);
        }
        auto type = in.get<int32_t>();
        uint64_t n = 1;
        const bool is_array = type == GGUF_TYPE_ARRAY;
        if (is_array) {
            type = in.get<int32_t>();
            n = in.get<uint64_t>();
        }
        if (key == STATE_KEY) {
            return read_array(in, type, is_array, n); // where both are, an old version has embedded again
        } else if (key == OFFSET_KEY) {
            offset = read_number<uint64_t>(in, key, type, is_array, GGUF_TYPE_UINT64);
            has_offset = true;
        } else if (key == SIZE_KEY) {
            size = read_number<uint64_t>(in, key, type, is_array, GGUF_TYPE_UINT64);
            has_size = true;
        } else if (key == ALIGNMENT_KEY) {
            alignment = read_number<uint32_t>(in, key, type, is_array, GGUF_TYPE_UINT32);
        } else {
            skip_values(in, type, n);
        }
    }
    if (!has_offset && !has_size) {
        refuse("%s has no prefix embedded: none of its %" PRIu64
               " keys is %s or %s: name an .ikv file, or embed one with "
               "intactkv-export embed",
                in.path, n_kv, OFFSET_KEY, STATE_KEY);
    }
    if (!has_offset || !has_size) {
        refuse("%s is damaged: of the keys %s and %s it has only one: embed the prefix again", in.path, OFFSET_KEY,
                SIZE_KEY);
    }
    return read_behind(in, n_tensors, alignment, offset, size);
}

bool read_bytes(const char * path, std::vector<uint8_t> & out, std::string & error) {
    try {
        input in(path);
        if (in.left() == 0) {
            refuse("%s is empty, it has 0 bytes and a prefix file has some: %s", path, DOWNLOAD);
        }
        unsigned char magic[4] = {};
        in.read(magic, std::min<uint64_t>(in.left(), sizeof(magic)));
        if (memcmp(magic, GGUF_MAGIC, 4) == 0) {
            out = read_embedded(in);
        } else if (memcmp(magic, IKV_MAGIC, 4) == 0) {
            out.assign(magic, magic + 4);
            out.resize(4 + in.left());
            in.read(out.data() + 4, in.left());
        } else {
            refuse("%s is neither a prefix file nor a GGUF: it begins with the bytes %02x%02x%02x%02x, these with "
                   "71736767 and 47475546: check the path",
                    path, magic[0], magic[1], magic[2], magic[3]);
        }
        return true;
    } catch (const refused & err) {
        error = err.what();
    } catch (const std::exception & err) {
        error = std::string("cannot read ") + (path ? path : "") + " (" + err.what() +
                "): free some memory and try again";
    }
    return false;
}

bool has_trailer(const char * path) {
    try {
        input in(path);
        if (in.left() < TRAILER_MAGIC_SIZE) {
            return false;
        }
        in.skip(in.left() - TRAILER_MAGIC_SIZE);
        char magic[TRAILER_MAGIC_SIZE];
        in.read(magic, sizeof(magic));
        return memcmp(magic, TRAILER_MAGIC, TRAILER_MAGIC_SIZE) == 0;
    } catch (const std::exception &) {
        return false;
    }
}

} // namespace intactkv
