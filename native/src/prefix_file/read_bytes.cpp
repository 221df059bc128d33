#include "prefix_file/read_bytes.h"

#include "prefix_file/parse.h"
#include "prefix_file/refuse.h"

#include "gguf.h"

#include <algorithm>
#include <cctype>
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
static constexpr const char * NAMES_KEY = "intactkv.prefix.names";
static constexpr const char * OFFSETS_KEY = "intactkv.prefix.offsets";
static constexpr const char * SIZES_KEY = "intactkv.prefix.sizes";
static constexpr const char * ALIGNMENT_KEY = "general.alignment";
static constexpr size_t LONGEST_KEY = 23; // of these
static constexpr size_t LONGEST_NAME = 64;
static constexpr uint64_t MOST_PREFIXES = 4096;
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

// An array of bytes that is a prefix itself: where it is.
static embedded_prefix skip_array(input & in, int32_t type, bool is_array, uint64_t n) {
    if (!is_array || type != GGUF_TYPE_UINT8) {
        refuse("the key %s of %s is of GGUF type %" PRId32 ", not an array of type %d: embed the prefix again",
                STATE_KEY, in.path, type, GGUF_TYPE_UINT8);
    }
    in.need(n);
    return { "", in.pos, n };
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

// What a list of prefixes says of them, key by key.
struct prefix_list {
    std::vector<std::string> names;
    std::vector<uint64_t> offsets, sizes;
};

static uint64_t array_length(
        input & in, const std::string & key, int32_t type, bool is_array, uint64_t n, int32_t wanted) {
    if (!is_array || type != wanted || n < 1 || n > MOST_PREFIXES) {
        refuse("the key %s of %s is %s GGUF type %" PRId32 ", not an array of 1 to %" PRIu64 " values of type %" PRId32
               ": embed the prefixes again",
                key.c_str(), in.path, is_array ? "an array of" : "of", type, MOST_PREFIXES, wanted);
    }
    return n;
}

static std::vector<uint64_t> read_numbers(
        input & in, const std::string & key, int32_t type, bool is_array, uint64_t n) {
    std::vector<uint64_t> res(array_length(in, key, type, is_array, n, GGUF_TYPE_UINT64));
    for (uint64_t & value : res) {
        value = in.get<uint64_t>();
    }
    return res;
}

static bool is_name(const std::string & name) {
    return !name.empty() && name.size() <= LONGEST_NAME && std::all_of(name.begin(), name.end(), [](unsigned char c) {
        return c < 128 && (isalnum(c) || strchr("._-", c));
    });
}

static std::vector<std::string> read_names(
        input & in, const std::string & key, int32_t type, bool is_array, uint64_t n) {
    std::vector<std::string> res;
    array_length(in, key, type, is_array, n, GGUF_TYPE_STRING);
    for (uint64_t i = 0; i < n; ++i) {
        const auto size = in.get<uint64_t>();
        std::string name(std::min<uint64_t>(size, LONGEST_NAME + 1), 0);
        in.read(&name[0], name.size());
        if (!is_name(name)) {
            refuse("prefix %" PRIu64 " of %s has a name that is not 1 to %zu of A-Z, a-z, 0-9, ., _ and -: embed the "
                   "prefixes again",
                    i, in.path, LONGEST_NAME);
        }
        if (std::find(res.begin(), res.end(), name) != res.end()) {
            refuse("two prefixes of %s have the name %s: embed the prefixes again", in.path, name.c_str());
        }
        res.push_back(std::move(name));
    }
    return res;
}

// One list of all that is said: a file has the first prefix, and the list where there are more.
static prefix_list checked(const input & in, prefix_list list, uint64_t offset, uint64_t size) {
    if (list.names.empty() && list.offsets.empty() && list.sizes.empty()) {
        return { { "" }, { offset }, { size } };
    }
    if (list.names.size() != list.offsets.size() || list.names.size() != list.sizes.size()) {
        refuse("%s is damaged: it has %zu names of prefixes, %zu offsets and %zu sizes: embed the prefixes again",
                in.path, list.names.size(), list.offsets.size(), list.sizes.size());
    }
    if (list.offsets[0] != offset || list.sizes[0] != size) {
        refuse("%s is damaged: its first prefix has %" PRIu64 " bytes at %" PRIu64 " according to %s, %s and %" PRIu64
               " at %" PRIu64 " according to %s, %s: embed the prefixes again",
                in.path, size, offset, SIZE_KEY, OFFSET_KEY, list.sizes[0], list.offsets[0], SIZES_KEY, OFFSETS_KEY);
    }
    return list;
}

// Whether the next bytes are a prefix: its first, its last. Forward, as everything here.
static bool has_magics(input & in, uint64_t size) {
    char magic[TRAILER_MAGIC_SIZE];
    in.read(magic, 4);
    bool res = memcmp(magic, IKV_MAGIC, 4) == 0;
    in.skip(size - 4 - TRAILER_MAGIC_SIZE);
    in.read(magic, TRAILER_MAGIC_SIZE);
    return res && memcmp(magic, TRAILER_MAGIC, TRAILER_MAGIC_SIZE) == 0;
}

[[noreturn]] static void lost(
        const char * path, const std::string & name, uint64_t offset, uint64_t size, uint64_t left) {
    refuse("the prefix%s%s embedded in %s is lost: its %" PRIu64 " bytes should begin %" PRIu64
           " bytes into the %" PRIu64
           " of tensor data and do not, another program has cut or written the file: embed it again with "
           "intactkv-export embed, or get the file again",
            name.empty() ? "" : " ", name.c_str(), path, size, offset, left);
}

// Prefixes at offsets of the tensor data, behind the last tensor: where they are in the file.
static std::vector<embedded_prefix> find_behind(
        input & in, int64_t n_tensors, uint64_t alignment, const prefix_list & list) {
    const uint64_t last = skip_tensors(in, n_tensors);
    if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
        refuse("%s is damaged: its alignment is %" PRIu64 ", not a power of two: %s", in.path, alignment, DOWNLOAD);
    }
    const uint64_t padding = (alignment - in.pos % alignment) % alignment;
    const uint64_t left = in.left() - std::min(in.left(), padding); // from the tensor data on
    const uint64_t start = in.pos + padding;
    std::vector<embedded_prefix> res;
    for (size_t i = 0; i < list.names.size(); ++i) {
        const uint64_t offset = list.offsets[i], size = list.sizes[i];
        if (offset > left || size > left - offset || size < 4 + TRAILER_MAGIC_SIZE ||
                (n_tensors > 0 && offset <= last) || start + offset < in.pos) {
            lost(in.path, list.names[i], offset, size, left);
        }
        in.skip(start + offset - in.pos);
        if (!has_magics(in, size)) {
            lost(in.path, list.names[i], offset, size, left);
        }
        res.push_back({ list.names[i], start + offset, size });
    }
    return res;
}

// The prefixes in a GGUF whose magic was read: behind the tensors, or in files of before the array intactkv.state. Not
// with gguf_init_from_file(): that reads arrays value by value, and writes to the log what should be our one sentence.
static std::vector<embedded_prefix> find_embedded(input & in) {
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
    prefix_list list;
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
            return { skip_array(in, type, is_array, n) }; // where both are, an old version has embedded again
        } else if (key == OFFSET_KEY) {
            offset = read_number<uint64_t>(in, key, type, is_array, GGUF_TYPE_UINT64);
            has_offset = true;
        } else if (key == SIZE_KEY) {
            size = read_number<uint64_t>(in, key, type, is_array, GGUF_TYPE_UINT64);
            has_size = true;
        } else if (key == NAMES_KEY) {
            list.names = read_names(in, key, type, is_array, n);
        } else if (key == OFFSETS_KEY) {
            list.offsets = read_numbers(in, key, type, is_array, n);
        } else if (key == SIZES_KEY) {
            list.sizes = read_numbers(in, key, type, is_array, n);
        } else if (key == ALIGNMENT_KEY) {
            alignment = read_number<uint32_t>(in, key, type, is_array, GGUF_TYPE_UINT32);
        } else {
            skip_values(in, type, n);
        }
    }
    if (!has_offset && !has_size) {
        return {};
    }
    if (!has_offset || !has_size) {
        refuse("%s is damaged: of the keys %s and %s it has only one: embed the prefix again", in.path, OFFSET_KEY,
                SIZE_KEY);
    }
    return find_behind(in, n_tensors, alignment, checked(in, std::move(list), offset, size));
}

// Calls f() and turns what it throws into a sentence.
template <typename F> static bool attempt(const char * path, std::string & error, F f) {
    try {
        f();
        return true;
    } catch (const refused & err) {
        error = err.what();
    } catch (const std::exception & err) {
        error = std::string("cannot read ") + (path ? path : "") + " (" + err.what() +
                "): free some memory and try again";
    }
    return false;
}

// The magic of a file that is no .ikv and no GGUF is its error.
static bool is_gguf(input & in) {
    if (in.left() == 0) {
        refuse("%s is empty, it has 0 bytes and a prefix file has some: %s", in.path, DOWNLOAD);
    }
    unsigned char magic[4] = {};
    in.read(magic, std::min<uint64_t>(in.left(), sizeof(magic)));
    if (memcmp(magic, GGUF_MAGIC, 4) == 0) {
        return true;
    }
    if (memcmp(magic, IKV_MAGIC, 4) != 0) {
        refuse("%s is neither a prefix file nor a GGUF: it begins with the bytes %02x%02x%02x%02x, these with "
               "71736767 and 47475546: check the path",
                in.path, magic[0], magic[1], magic[2], magic[3]);
    }
    return false;
}

static std::vector<embedded_prefix> list(const char * path) {
    input in(path);
    if (is_gguf(in)) {
        return find_embedded(in);
    }
    return { { "", 0, in.pos + in.left() } };
}

static std::vector<uint8_t> read(const char * path, const embedded_prefix & from) {
    input in(path);
    in.skip(from.at);
    in.need(from.size);
    std::vector<uint8_t> res(from.size);
    in.read(res.data(), res.size());
    return res;
}

bool list_prefixes(const char * path, std::vector<embedded_prefix> & out, std::string & error) {
    return attempt(path, error, [&] { out = list(path); });
}

bool read_prefix(const char * path, const embedded_prefix & from, std::vector<uint8_t> & out, std::string & error) {
    return attempt(path, error, [&] { out = read(path, from); });
}

bool read_bytes(const char * path, std::vector<uint8_t> & out, std::string & error) {
    return attempt(path, error, [&] {
        const auto found = list(path);
        if (found.empty()) {
            refuse("%s has no prefix embedded: it has neither of the keys %s and %s: name an .ikv file, or embed one with "
                   "intactkv-export embed",
                    path, OFFSET_KEY, STATE_KEY);
        }
        out = read(path, found[0]);
    });
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
