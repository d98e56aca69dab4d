// A lossless code for bfloat16 weights. The exponents of trained weights have some 2.6 bits of entropy, signs and mantissas
// have none to spare: exponents get a Huffman code, the rest stays as it is. About 66% of the bytes are left.
//
// The numbers of a tensor, in row-major order, are cut into chunks of one size, at most kChunk; the last one may have fewer. A
// chunk is
//   uint32    checksum of what follows, of the chunk's number and of the code
//   uint16[4] bytes of each stream
//   4 streams of exponents: stream s has those of numbers [s q, min(n, (s + 1) q)), q = ceil(n / 4)
//   n bytes   sign (the upper bit) and mantissa of each number
// or, where that would not be shorter,
//   uint32    checksum
//   n bfloat16
// all little-endian. Which of the two it is follows from its size.
//
// The code is canonical: a tensor keeps the lengths of its 256 words, at most kMaxBits. A word's first bit is the lowest of a
// stream that is not read yet.
//
// Sources: Hershcovitch et al. 2024 (ZipNN) and Zhang et al. 2025 (DFloat11), which exponents to code and why; Moffat & Turpin
// 1997, "On the implementation of minimum redundancy prefix codes", canonical codes that are decoded by table; Giesen 2014,
// "Interleaved entropy coders", several streams at once, for a processor that would otherwise wait for each look-up.
#pragma once

#include <cstdint>

namespace lossless {

constexpr uint64_t kChunk = 16384;  // numbers, at most
constexpr int kStreams = 4;
constexpr int kMaxBits = 11;  // a table of 16 KiB: it stays in a core's first cache beside the chunk
constexpr uint64_t kHeaderBytes = 4 + 2 * kStreams;

inline uint64_t raw_bytes(uint64_t numbers) { return 4 + 2 * numbers; }

// The words of a code, and what a decoder looks up.
struct Code {
    uint8_t lengths[256];  // bits; 0: no word
    uint16_t words[256];   // the first bit lowest
    // For every kMaxBits bits the words that they begin with, at most six: their bits together (byte 0), their count (byte 1),
    // their symbols (from byte 2).
    uint64_t table[1 << kMaxBits];
    uint64_t seed;  // of checksums
};

// From lengths to words. False where they are not those of a complete code: sum 2^-length = 1.
bool make_code(const uint8_t* lengths, Code& code);
// The table, for decoders.
void make_table(Code& code);

// Encodes `numbers` bfloat16 of chunk `index`; returns the bytes at `to`, which has room for raw_bytes(numbers).
uint64_t encode_chunk(const Code& code, uint64_t index, const char* from, uint64_t numbers, uint8_t* to);

// Decodes numbers [first, last) of chunk `index`, which has `numbers`, to bfloat16 or, with `wide`, fp32. Returns what is wrong
// with it, or null. Whatever the bytes are, nothing but [from, from + size) is read and nothing but the target is written.
const char* decode_chunk(const Code& code, uint64_t index, const uint8_t* from, uint64_t size, uint64_t numbers,
                         uint64_t first, uint64_t last, char* to, bool wide);

}  // namespace lossless
