// The decoders of GGUF's blocks for AVX2 and F16C; compiled with these flags and called only where the processor has them.
#include "blocks.h"

#if defined(__AVX2__) && defined(__F16C__)
namespace blocks {
namespace {

#include "blocks_tile.inc"

}  // namespace

RunFunction run_avx2() { return decode_any; }

}  // namespace blocks

#else
namespace blocks {
RunFunction run_avx2() { return nullptr; }
}  // namespace blocks
#endif
