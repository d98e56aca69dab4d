// The decoders of GGUF's blocks for every processor.
#include "blocks.h"

namespace blocks {
namespace {

#include "blocks_tile.inc"

}  // namespace

RunFunction run_portable() { return decode_any; }

}  // namespace blocks
