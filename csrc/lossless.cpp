// Python's view of the lossless code: chunks spread over threads, and checks of what the codec takes on trust.
#include "lossless.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "lossless_bindings.h"

namespace nb = nanobind;

namespace lossless {

namespace {

uint64_t chunks_of(uint64_t numbers, uint64_t chunk) { return (numbers + chunk - 1) / chunk; }

void check_chunk(uint64_t chunk) {
    if (!chunk || chunk > kChunk) throw std::invalid_argument("expected chunks of at most CHUNK numbers");
}

std::unique_ptr<Code> code_of(uint64_t lengths) {
    if (!lengths) throw std::invalid_argument("a null address");
    auto code = std::make_unique<Code>();
    if (!make_code(reinterpret_cast<const uint8_t*>(lengths), *code))
        throw std::invalid_argument("the lengths of the code's words are not those of a complete code");
    return code;
}

std::array<uint64_t, 256> count_exponents(uint64_t address, uint64_t numbers, int threads) {
    if (numbers && !address) throw std::invalid_argument("a null address");
    nb::gil_scoped_release release;
    std::array<std::atomic<uint64_t>, 256> totals{};
    in_parallel(chunks_of(numbers, kChunk), 4, threads, [&](uint64_t chunk) {
        const uint64_t first = chunk * kChunk, count = std::min(kChunk, numbers - first);
        uint32_t counts[4][256] = {};  // neighbours are often alike, and would wait for one another
        for (uint64_t i = 0; i < count; ++i) {
            uint16_t bits;
            std::memcpy(&bits, reinterpret_cast<const char*>(address) + 2 * (first + i), 2);
            ++counts[i & 3][bits >> 7 & 0xff];
        }
        for (int e = 0; e < 256; ++e)
            if (const uint64_t sum = uint64_t{counts[0][e]} + counts[1][e] + counts[2][e] + counts[3][e])
                totals[e].fetch_add(sum, std::memory_order_relaxed);
    });
    std::array<uint64_t, 256> found;
    for (int e = 0; e < 256; ++e) found[e] = totals[e];
    return found;
}

// Returns the bytes of every chunk; they lie at `target` one after another.
std::vector<uint64_t> encode(uint64_t lengths, uint64_t chunk, uint64_t first_chunk, uint64_t source, uint64_t numbers,
                             uint64_t target, uint64_t capacity, int threads) {
    check_chunk(chunk);
    const uint64_t chunks = chunks_of(numbers, chunk), room = raw_bytes(chunk);
    if (!source || !target) throw std::invalid_argument("a null address");
    if (capacity < chunks * room) throw std::invalid_argument("expected room for every chunk as it is");
    const auto code = code_of(lengths);
    nb::gil_scoped_release release;
    std::vector<uint64_t> sizes(chunks);
    uint8_t* to = reinterpret_cast<uint8_t*>(target);
    in_parallel(chunks, 1, threads, [&](uint64_t i) {
        const char* from = reinterpret_cast<const char*>(source) + 2 * chunk * i;
        sizes[i] = encode_chunk(*code, first_chunk + i, from, std::min(chunk, numbers - i * chunk), to + i * room);
    });
    uint8_t* end = to;
    for (uint64_t i = 0; i < chunks; end += sizes[i++]) std::memmove(end, to + i * room, sizes[i]);
    return sizes;
}

// Numbers [start, stop) of a tensor of `numbers`. packed: the bytes from the chunk of `start` to that of the last number.
// offsets: int64, where each of these chunks begins, and the last one ends, in the whole tensor's bytes.
void decode(uint64_t lengths, uint64_t chunk, uint64_t offsets, uint64_t packed, uint64_t packed_bytes, uint64_t numbers,
            uint64_t start, uint64_t stop, uint64_t target, Dtype dtype, int threads) {
    check_chunk(chunk);
    if (start >= stop || stop > numbers) throw std::invalid_argument("expected numbers of the tensor");
    if (!offsets || !packed || !target) throw std::invalid_argument("a null address");
    if (dtype == Dtype::kFloat16) throw std::invalid_argument("expected bfloat16 or fp32");
    const auto code = code_of(lengths);
    make_table(*code);
    nb::gil_scoped_release release;
    const bool wide = dtype == Dtype::kFloat32;
    const uint64_t first_chunk = start / chunk, chunks = chunks_of(stop, chunk) - first_chunk;
    auto offset = [&](uint64_t i) {
        uint64_t value;
        std::memcpy(&value, reinterpret_cast<const char*>(offsets) + 8 * i, 8);
        return value;
    };
    const uint64_t base = offset(0);
    std::atomic<const char*> wrong{nullptr};
    in_parallel(chunks, kChunk / chunk, threads, [&](uint64_t i) {
        const uint64_t begin = offset(i) - base, end = offset(i + 1) - base, at = (first_chunk + i) * chunk;
        if (begin > end || end > packed_bytes || (i + 1 == chunks && end != packed_bytes)) {
            wrong = "the chunks' offsets do not fit its bytes";
            return;
        }
        const uint64_t count = std::min(chunk, numbers - at);
        const uint64_t first = std::max(start, at) - at, last = std::min(stop, at + count) - at;
        char* to = reinterpret_cast<char*>(target) + (at + first - start) * size_of(dtype);
        const auto* from = reinterpret_cast<const uint8_t*>(packed) + begin;
        const char* what = decode_chunk(*code, first_chunk + i, from, end - begin, count, first, last, to, wide);
        if (what) wrong = what;
    });
    if (const char* what = wrong) throw std::invalid_argument(what);
}

}  // namespace

}  // namespace lossless

void register_lossless(nb::module_& m) {
    nb::module_ sub = m.def_submodule("lossless", "bfloat16 weights with coded exponents; the format is in csrc/lossless.h.");
    sub.attr("CHUNK") = lossless::kChunk;
    sub.attr("MAX_BITS") = lossless::kMaxBits;
    sub.def("count_exponents", &lossless::count_exponents, nb::arg("source"), nb::arg("numbers"), nb::arg("threads"));
    sub.def("encode", &lossless::encode, nb::arg("lengths"), nb::arg("chunk"), nb::arg("first_chunk"), nb::arg("source"),
            nb::arg("numbers"), nb::arg("target"), nb::arg("capacity"), nb::arg("threads"));
    sub.def("decode", &lossless::decode, nb::arg("lengths"), nb::arg("chunk"), nb::arg("offsets"), nb::arg("packed"),
            nb::arg("packed_bytes"), nb::arg("numbers"), nb::arg("start"), nb::arg("stop"), nb::arg("target"),
            nb::arg("dtype"), nb::arg("threads"));
}
