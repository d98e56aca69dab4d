// The code of lossless.h in portable C++. It decodes several words at a look-up and does not wait for one stream's look-up
// before the next stream's. Compiled for AVX2 and AVX-512 it was no faster.
#include "lossless.h"

#include <algorithm>
#include <cstring>

namespace lossless {

namespace {

constexpr int kLookups = 5;     // of a stream between two loads: 7 bits may be read already, and 5 * 11 + 7 <= 64
constexpr int kMostSymbols = 6;  // of a look-up
constexpr uint64_t kStreamRoom = kChunk / kStreams + 8;  // a look-up stores 8 bytes, whatever it found

uint64_t mix(uint64_t x) {  // splitmix64's finaliser
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// Sums, and sums of sums, of 32-bit words in 16 lanes (Fletcher 1982): one word that changes always changes the result.
uint32_t checksum(uint64_t seed, const uint8_t* from, uint64_t size) {
    constexpr int kLanes = 16;
    uint32_t sums[kLanes] = {}, sums_of_sums[kLanes] = {};
    auto add = [&](const uint8_t* bytes) {
        uint32_t words[kLanes];
        std::memcpy(words, bytes, sizeof words);
        for (int i = 0; i < kLanes; ++i) sums[i] += words[i], sums_of_sums[i] += sums[i];
    };
    uint64_t at = 0;
    for (; at + 4 * kLanes <= size; at += 4 * kLanes) add(from + at);
    uint8_t rest[4 * kLanes] = {};
    std::memcpy(rest, from + at, size - at);
    add(rest);
    uint64_t found = mix(seed ^ size);
    for (int i = 0; i < kLanes; ++i) found = mix(found ^ (uint64_t{sums_of_sums[i]} << 32 | sums[i]));
    return static_cast<uint32_t>(found);
}

uint32_t checksum_of(const Code& code, uint64_t index, const uint8_t* chunk, uint64_t size) {
    return checksum(mix(code.seed + index), chunk + 4, size - 4);
}

uint64_t load8(const uint8_t* from) {
    uint64_t value;
    std::memcpy(&value, from, 8);
    return value;
}

struct Stream {
    const uint8_t* from;
    uint64_t bytes;
    uint64_t bits;  // that are read
    uint8_t *to, *end;
};

// While every stream has enough of both ends before it, without a look at either.
void decode_together(const Code& code, Stream (&streams)[kStreams], const uint8_t* limit) {
    const uint8_t* from[kStreams];
    uint64_t bits[kStreams];
    uint8_t* to[kStreams];
    for (int s = 0; s < kStreams; ++s) from[s] = streams[s].from, bits[s] = streams[s].bits, to[s] = streams[s].to;
    for (;;) {
        int64_t rounds = INT64_MAX;  // one reads at most 7 more bytes and 1 bit, of 8 that are loaded
        for (int s = 0; s < kStreams; ++s) {
            const int64_t in = (limit - from[s] - static_cast<int64_t>(bits[s] >> 3)) / 8;
            rounds = std::min({rounds, in, (streams[s].end - to[s]) / (kLookups * kMostSymbols)});
        }
        if (rounds <= 0) break;
        for (; rounds > 0; --rounds) {
#pragma GCC unroll 4
            for (int s = 0; s < kStreams; ++s) {
                uint64_t window = load8(from[s] + (bits[s] >> 3)) >> (bits[s] & 7), sum = 0;
#pragma GCC unroll 5
                for (int i = 0; i < kLookups; ++i) {
                    const uint64_t entry = code.table[window & ((1 << kMaxBits) - 1)], symbols = entry >> 16;
                    std::memcpy(to[s], &symbols, 8);
                    to[s] += entry >> 8 & 0xff;
                    window >>= entry & 63;
                    sum += entry;
                }
                bits[s] += sum & 0xff;
            }
        }
    }
    for (int s = 0; s < kStreams; ++s) streams[s].bits = bits[s], streams[s].to = to[s];
}

// What is left of one. False unless its last word ends in its last byte.
bool decode_rest(const Code& code, Stream& stream, const uint8_t* limit) {
    while (stream.to < stream.end) {
        const uint8_t* from = stream.from + (stream.bits >> 3);
        if (from >= limit) return false;
        uint64_t window = 0;
        std::memcpy(&window, from, std::min<uint64_t>(8, limit - from));
        const uint64_t entry = code.table[window >> (stream.bits & 7) & ((1 << kMaxBits) - 1)], symbols = entry >> 16;
        std::memcpy(stream.to, &symbols, 8);
        const int64_t count = entry >> 8 & 0xff;
        if (count <= stream.end - stream.to) {
            stream.to += count;
            stream.bits += entry & 63;
        } else {
            while (stream.to < stream.end) stream.bits += code.lengths[*stream.to++];
        }
    }
    return (stream.bits + 7) / 8 == stream.bytes;
}

void join(const uint8_t* exponents, const uint8_t* rests, uint64_t count, uint16_t* to) {
    for (uint64_t i = 0; i < count; ++i)
        to[i] = static_cast<uint16_t>((rests[i] & 0x80) << 8 | exponents[i] << 7 | (rests[i] & 0x7f));
}

void join(const uint8_t* exponents, const uint8_t* rests, uint64_t count, uint32_t* to) {
    for (uint64_t i = 0; i < count; ++i)
        to[i] = uint32_t{rests[i] & 0x80u} << 24 | uint32_t{exponents[i]} << 23 | uint32_t{rests[i] & 0x7fu} << 16;
}

void widen(const uint8_t* from, uint64_t count, uint32_t* to) {
    for (uint64_t i = 0; i < count; ++i) to[i] = uint32_t{from[2 * i]} << 16 | uint32_t{from[2 * i + 1]} << 24;
}

}  // namespace

bool make_code(const uint8_t* lengths, Code& code) {
    std::memcpy(code.lengths, lengths, sizeof code.lengths);
    uint32_t word = 0;
    for (int bits = 1; bits <= kMaxBits; ++bits) {
        word <<= 1;
        for (int symbol = 0; symbol < 256; ++symbol) {
            if (lengths[symbol] != bits) continue;
            if (word >> bits) return false;  // more words than there can be
            uint32_t reversed = 0;
            for (int i = 0; i < bits; ++i) reversed |= (word >> i & 1) << (bits - 1 - i);
            code.words[symbol] = static_cast<uint16_t>(reversed);
            ++word;
        }
    }
    code.seed = checksum(1, code.lengths, sizeof code.lengths);
    return word == 1 << kMaxBits && *std::max_element(lengths, lengths + 256) <= kMaxBits;
}

void make_table(Code& code) {
    uint8_t first[1 << kMaxBits];  // symbol that the bits begin with
    for (int symbol = 0; symbol < 256; ++symbol)
        if (const int bits = code.lengths[symbol])
            for (int i = code.words[symbol]; i < 1 << kMaxBits; i += 1 << bits) first[i] = static_cast<uint8_t>(symbol);
    for (int i = 0; i < 1 << kMaxBits; ++i) {
        uint64_t symbols = 0, bits = 0, count = 0;
        while (count < kMostSymbols) {
            const uint64_t symbol = first[i >> bits], more = code.lengths[symbol];
            if (bits + more > kMaxBits) break;
            symbols |= symbol << (16 + 8 * count++);
            bits += more;
        }
        code.table[i] = symbols | count << 8 | bits;
    }
}

uint64_t encode_chunk(const Code& code, uint64_t index, const char* from, uint64_t numbers, uint8_t* to) {
    const uint64_t share = (numbers + kStreams - 1) / kStreams, whole = raw_bytes(numbers);
    auto number = [&](uint64_t i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, 2);
        return bits;
    };
    uint64_t coded_bits[kStreams] = {}, size = kHeaderBytes + numbers;
    bool has_words = true;
    for (int s = 0; s < kStreams; ++s) {
        for (uint64_t i = s * share; i < std::min(numbers, (s + 1) * share); ++i) {
            const int bits = code.lengths[number(i) >> 7 & 0xff];
            has_words = has_words && bits;
            coded_bits[s] += bits;
        }
        size += (coded_bits[s] + 7) / 8;
    }
    if (size >= whole || !has_words) {
        size = whole;
        std::memcpy(to + 4, from, 2 * numbers);
    } else {
        uint8_t* at = to + kHeaderBytes;
        for (int s = 0; s < kStreams; ++s) {
            const uint16_t bytes = static_cast<uint16_t>((coded_bits[s] + 7) / 8);
            std::memcpy(to + 4 + 2 * s, &bytes, 2);
            uint64_t window = 0;
            int held = 0;
            for (uint64_t i = s * share; i < std::min(numbers, (s + 1) * share); ++i) {
                const int exponent = number(i) >> 7 & 0xff;
                window |= uint64_t{code.words[exponent]} << held;
                for (held += code.lengths[exponent]; held >= 8; held -= 8, window >>= 8) *at++ = static_cast<uint8_t>(window);
            }
            if (held) *at++ = static_cast<uint8_t>(window);
        }
        for (uint64_t i = 0; i < numbers; ++i) *at++ = static_cast<uint8_t>((number(i) & 0x7f) | (number(i) >> 8 & 0x80));
    }
    const uint32_t sum = checksum_of(code, index, to, size);
    std::memcpy(to, &sum, 4);
    return size;
}

const char* decode_chunk(const Code& code, uint64_t index, const uint8_t* from, uint64_t size, uint64_t numbers,
                         uint64_t first, uint64_t last, char* to, bool wide) {
    if (size > raw_bytes(numbers) || size < std::min(raw_bytes(numbers), kHeaderBytes + numbers))
        return "a chunk has a size that it cannot have";
    uint32_t expected;
    std::memcpy(&expected, from, 4);
    if (checksum_of(code, index, from, size) != expected) return "a checksum does not fit";
    if (size == raw_bytes(numbers)) {
        const uint8_t* wanted = from + 4 + 2 * first;
        if (wide)
            widen(wanted, last - first, reinterpret_cast<uint32_t*>(to));
        else
            std::memcpy(to, wanted, 2 * (last - first));
        return nullptr;
    }
    const uint8_t *limit = from + size, *rests = limit - numbers, *at = from + kHeaderBytes;
    const uint64_t share = (numbers + kStreams - 1) / kStreams;
    uint8_t exponents[kStreams][kStreamRoom];
    Stream streams[kStreams];
    uint64_t claimed = 0;
    for (int s = 0; s < kStreams; ++s) {
        uint16_t bytes;
        std::memcpy(&bytes, from + 4 + 2 * s, 2);
        const uint64_t start = std::min(numbers, s * share), stop = std::min(numbers, (s + 1) * share);
        streams[s] = {at, bytes, 0, exponents[s], exponents[s] + (stop - start)};
        at += std::min<uint64_t>(bytes, rests - at);
        claimed += bytes;
    }
    if (from + kHeaderBytes + claimed != rests) return "the streams of a chunk do not have its size";
    decode_together(code, streams, limit);
    for (Stream& stream : streams)
        if (!decode_rest(code, stream, limit)) return "a stream of exponents does not end where it should";
    for (int s = 0; s < kStreams; ++s) {
        const uint64_t start = std::max(first, s * share), stop = std::min(last, (s + 1) * share);
        if (start >= stop) continue;
        const uint8_t* here = exponents[s] + (start - s * share);
        if (wide)
            join(here, rests + start, stop - start, reinterpret_cast<uint32_t*>(to) + (start - first));
        else
            join(here, rests + start, stop - start, reinterpret_cast<uint16_t*>(to) + (start - first));
    }
    return nullptr;
}

}  // namespace lossless
