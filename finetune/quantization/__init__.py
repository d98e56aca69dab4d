"""`quantize`: a model's weights packed once, into a cache, before a run goes over them."""
