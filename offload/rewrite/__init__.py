"""A checkpoint written again with other values of some of its parameters, in a stream."""
