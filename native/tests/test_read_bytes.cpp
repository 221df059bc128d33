// read_bytes() and has_trailer(): files that are not there, not files, cut off, or lie about their sizes.

#include "check.h"
#include "gguf_sample.h"
#include "prefix_file/parse.h"
#include "prefix_file/read_bytes.h"
#include "sample.h"

#include <filesystem>
#include <fstream>

using namespace intactkv;
namespace fs = std::filesystem;

static std::string write(const fs::path & path, const bytes & content) {
    fs::remove(path); // a new file: to cut an old one off makes some file systems wait for the disk
    std::ofstream(path, std::ios::binary).write((const char *) content.data(), content.size());
    return path.string();
}

static std::string error_of(const std::string & path, bytes * content = nullptr) {
    bytes ignored;
    std::string error;
    const bool ok = read_bytes(path.c_str(), content ? *content : ignored, error);
    CHECK(ok == error.empty());
    if (!ok) {
        CHECK(is_sentence(error));
        CHECK(contains(error, path));
    }
    return error;
}

static void not_files(const fs::path & dir) {
    check_case = "not a file";
    CHECK(contains(error_of((dir / "none.ikv").string()), "No such file or directory"));
    CHECK(contains(error_of(""), "No such file or directory"));
    CHECK(contains(error_of(dir.string()), "it is a directory"));
    CHECK(contains(error_of("/dev/zero"), "it is a device"));
    CHECK(contains(error_of(write(dir / "empty.ikv", {})), "is empty"));
    CHECK(contains(error_of((dir / std::string(300, 'x')).string()), "File name too long"));
    bytes content;
    std::string error;
    CHECK(!read_bytes(nullptr, content, error));
    for (const auto & path : { dir / "none.ikv", dir, dir / "empty.ikv", fs::path("/dev/zero"), fs::path() }) {
        CHECK(!has_trailer(path.string().c_str()));
    }
    CHECK(!has_trailer(nullptr));

    check_case = "no permission";
    const std::string locked = write(dir / "locked.ikv", sample().file());
    fs::permissions(locked, fs::perms::none);
    if (!std::ifstream(locked)) { // root reads it anyway
        CHECK(contains(error_of(locked), "Permission denied"));
    }
}

static void prefix_files(const fs::path & dir) {
    check_case = "an .ikv";
    const bytes file = sample().file();
    const std::string path = write(dir / "good.ikv", file);
    bytes content;
    CHECK(error_of(path, &content) == "");
    CHECK(content == file);
    CHECK(has_trailer(path.c_str()));
    for (size_t n = 0; n < file.size(); n += n < 16 ? 1 : 97) {
        check_case = "cut at byte " + std::to_string(n);
        const bytes cut(file.begin(), file.begin() + n);
        const std::string cut_path = write(dir / "cut.ikv", cut);
        CHECK(!has_trailer(cut_path.c_str()));
        if (n < 4) {
            CHECK(error_of(cut_path) != "");
        } else { // which parse() then refuses
            CHECK(error_of(cut_path, &content) == "" && content == cut);
        }
    }
    check_case = "another file";
    CHECK(contains(error_of(write(dir / "text", bytes(100, 'x'))), "begins with the bytes 78787878"));
    check_case = "only a trailer";
    bytes trailer;
    put(trailer, std::string("INTACTKV"));
    CHECK(has_trailer(write(dir / "trailer", trailer).c_str()));
}

static void ggufs(const fs::path & dir) {
    const bytes file = sample().file();
    const fs::path path = dir / "model.gguf";
    for (const bool last : { false, true }) {
        check_case = last ? "state is the last key" : "state is the first key";
        bytes content;
        const bytes gguf = gguf_sample(file, last);
        CHECK(error_of(write(path, gguf), &content) == "");
        CHECK(content == file);
        CHECK(has_trailer(path.string().c_str()) == last); // which ends the file only because there are no tensors
        const size_t end = gguf_state_end(gguf, file);
        for (size_t n = 4; n < end; ++n) {
            check_case = "GGUF cut at byte " + std::to_string(n);
            CHECK(contains(error_of(write(path, bytes(gguf.begin(), gguf.begin() + n))), "cut off or damaged"));
        }
        CHECK(error_of(write(path, bytes(gguf.begin(), gguf.begin() + end))) == "");
    }
    check_case = "GGUF without state";
    CHECK(contains(error_of(write(path, gguf_sample({}, true, "intactkv.other"))), "has no prefix embedded"));
    check_case = "state of another type";
    bytes other = gguf_sample(file, false);
    other[24 + 8 + 14 + 4] = GGUF_INT8;
    CHECK(contains(error_of(write(path, other)), "is of GGUF type 1"));
    for (const uint32_t version : { 0u, 1u, 4u, 0x03000000u, 0xffffffffu }) {
        check_case = "GGUF version " + std::to_string(version);
        other = gguf_sample(file, false);
        memcpy(&other[4], &version, 4);
        CHECK(contains(error_of(write(path, other)), "GGUF version " + std::to_string(version)));
    }

    // every word before the state, one at a time: whatever happens, no more than the file is read or allocated
    const bytes good = gguf_sample(file, true);
    const size_t begin = gguf_state_end(good, file) - file.size();
    for (size_t i = 4; i + 8 <= begin; ++i) {
        for (const uint64_t word : { uint64_t(0), UINT64_MAX, uint64_t(1) << 63, uint64_t(1) << 61, uint64_t(1) << 40,
                     uint64_t(8) << 32 }) {
            check_case = "word " + std::to_string(word) + " at byte " + std::to_string(i);
            bytes bad = good;
            memcpy(&bad[i], &word, 8);
            bytes content;
            error_of(write(path, bad), &content);
            CHECK(content.size() <= bad.size());
        }
    }
}

static void behind_tensors(const fs::path & dir) {
    const bytes file = sample().file();
    const fs::path path = dir / "behind.gguf";
    bytes content;
    for (const uint32_t n_tensors : { 0u, 1u, 3u }) {
        for (const uint32_t alignment : { 8u, 32u, 4096u }) {
            check_case = std::to_string(n_tensors) + " tensors, alignment " + std::to_string(alignment);
            gguf_behind made;
            made.n_tensors = n_tensors;
            made.alignment = alignment;
            bytes gguf = made.file(file);
            CHECK(error_of(write(path, gguf), &content) == "");
            CHECK(content == file);
            CHECK(has_trailer(path.string().c_str()));
            gguf.resize(gguf.size() + 5, 1); // what others add behind it
            CHECK(error_of(write(path, gguf), &content) == "" && content == file);
        }
    }
    const bytes good = gguf_behind().file(file);
    const size_t begin = good.size() - file.size();
    for (size_t n = 4; n < good.size(); n += n < begin ? 1 : 53) {
        check_case = "cut at byte " + std::to_string(n);
        const std::string error = error_of(write(path, bytes(good.begin(), good.begin() + n)));
        CHECK(contains(error, "cut off or damaged") || contains(error, "is lost"));
        CHECK(n < begin || contains(error, "is lost"));
    }
    check_case = "both: the array is the newer one";
    bytes both = gguf_sample(bytes(7, 'x'), true);
    both[16] = 17;
    bytes offset;
    put_number<uint64_t>(offset, "intactkv.state.offset", GGUF_UINT64, 0);
    both.insert(both.begin() + 24, offset.begin(), offset.end());
    CHECK(error_of(write(path, both), &content) == "" && content == bytes(7, 'x'));

    const auto refused_as = [&](const char * name, const gguf_behind & made, const char * part) {
        check_case = name;
        CHECK(contains(error_of(write(path, made.file(file))), part));
    };
    const int64_t end = 2 * gguf_behind().each();
    for (const int64_t at : { int64_t(0), int64_t(32), end - 1, end + 1, INT64_MAX, INT64_MAX - end }) {
        refused_as("another offset", { 2, 32, at }, "is lost");
    }
    for (const int64_t size :
            { int64_t(0), int64_t(4), int64_t(11), int64_t(12), int64_t(file.size() - 1), INT64_MAX }) {
        refused_as("another size", { 2, 32, -1, size }, "is lost");
    }
    refused_as("a number of another type", { 2, 32, -1, -1, GGUF_FLOAT64 }, "is of GGUF type 12");
    refused_as("no size", { 2, 32, -1, -1, GGUF_UINT64, false }, "has only one");
    gguf_behind odd;
    odd.alignment = 24; // no power of two
    refused_as("alignment", odd, "its alignment is 24");

    for (size_t i = 4; i + 8 <= begin; ++i) {
        for (const uint64_t word :
                { uint64_t(0), UINT64_MAX, uint64_t(1) << 63, uint64_t(1) << 40, uint64_t(8) << 32 }) {
            check_case = "word " + std::to_string(word) + " at byte " + std::to_string(i) + ", behind tensors";
            bytes bad = good;
            memcpy(&bad[i], &word, 8);
            content.clear();
            error_of(write(path, bad), &content);
            CHECK(content.size() <= bad.size());
        }
    }
}

static void several(const fs::path & dir) {
    check_case = "several prefixes";
    const bytes file = sample().file();
    bytes second = file;
    second.insert(second.begin() + 4, 9, 'x'); // of another size; what is in it does not matter here
    const fs::path path = dir / "several.gguf";
    const gguf_several good({ file, second, file });
    std::vector<embedded_prefix> found;
    std::string error;
    bytes content;
    const std::string name = write(path, good.file());
    CHECK(list_prefixes(name.c_str(), found, error) && found.size() == 3);
    for (size_t i = 0; i < found.size(); ++i) {
        CHECK(found[i].name == good.names[i]);
        CHECK(read_prefix(name.c_str(), found[i], content, error) && content == good.prefixes[i]);
    }
    CHECK(error_of(name, &content) == "" && content == file); // the first
    write(path, gguf_behind().file(file));
    CHECK(list_prefixes(name.c_str(), found, error) && found.size() == 1 && found[0].name == "");
    write(path, gguf_sample({}, true, "intactkv.other"));
    CHECK(list_prefixes(name.c_str(), found, error) && found.empty());
    write(path, file);
    CHECK(list_prefixes(name.c_str(), found, error) && found.size() == 1 && found[0].size == file.size());

    const auto refused_as = [&](const char * what, const gguf_several & made, const char * part) {
        check_case = what;
        const std::string error = error_of(write(path, made.file()));
        CHECK(contains(error, part));
    };
    gguf_several bad = good;
    bad.names.pop_back();
    refused_as("a name too few", bad, "2 names of prefixes, 3 offsets and 3 sizes");
    bad = good;
    bad.sizes.push_back(7);
    refused_as("a size too many", bad, "3 offsets and 4 sizes");
    bad = good;
    bad.offsets.clear();
    refused_as("no offsets", bad, "intactkv.prefix.offsets");
    bad = good;
    bad.offsets[0] += 32;
    refused_as("another first", bad, "its first prefix has");
    for (const uint64_t at : { uint64_t(0), good.offsets[1] - 1, good.offsets[1] + 32, UINT64_MAX }) {
        bad = good;
        bad.offsets[1] = at;
        refused_as("another offset", bad, "prefix p-1 embedded");
    }
    for (const uint64_t size : { uint64_t(0), uint64_t(11), good.sizes[2] - 1, UINT64_MAX }) {
        bad = good;
        bad.sizes[2] = size;
        refused_as("another size", bad, "prefix p-2 embedded");
    }
    for (const char * odd : { "", "a b", "../x", "\xc3\xa4", "x\n" }) {
        bad = good;
        bad.names[1] = odd;
        refused_as("a name that is none", bad, "prefix 1 of");
    }
    bad = good;
    bad.names[1] = std::string(65, 'x');
    refused_as("a name that is too long", bad, "prefix 1 of");
    bad = good;
    bad.names[2] = bad.names[0];
    refused_as("a name twice", bad, "two prefixes of");
    check_case = "numbers of another type";
    CHECK(contains(error_of(write(path, good.file(GGUF_FLOAT64))), "an array of GGUF type 12"));

    const bytes whole = good.file();
    const size_t begin = whole.size() - file.size();
    for (size_t n = 4; n < whole.size(); n += n < 2500 ? 1 : 53) {
        check_case = "several, cut at byte " + std::to_string(n);
        const std::string cut = error_of(write(path, bytes(whole.begin(), whole.begin() + n)));
        CHECK(contains(cut, "cut off or damaged") || contains(cut, "is lost") ||
                contains(cut, "embed the prefixes again"));
        CHECK(n < begin || contains(cut, "is lost"));
    }
    for (size_t i = 4; i + 8 <= 2500; ++i) {
        for (const uint64_t word : { uint64_t(0), UINT64_MAX, uint64_t(1) << 40, uint64_t(8) << 32 }) {
            check_case = "word " + std::to_string(word) + " at byte " + std::to_string(i) + ", several";
            bytes changed = whole;
            memcpy(&changed[i], &word, 8);
            content.clear();
            error_of(write(path, changed), &content);
            CHECK(content.size() <= changed.size());
        }
    }
}

void test_read_bytes(const char * dir) {
    not_files(dir);
    prefix_files(dir);
    ggufs(dir);
    behind_tensors(dir);
    several(dir);
}
