"""A checkpoint in 16 or 32 bits written again with its linear layers packed, in a stream."""
