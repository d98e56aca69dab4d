// The decoders of GGUF's blocks for AVX-512 (F, BW, DQ, VL); compiled with these flags and called only where the processor has them.
#include "blocks.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
namespace blocks {
namespace {

#include "blocks_tile.inc"

}  // namespace

RunFunction run_avx512() { return decode_any; }

}  // namespace blocks

#else
namespace blocks {
RunFunction run_avx512() { return nullptr; }
}  // namespace blocks
#endif
