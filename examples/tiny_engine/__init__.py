"""A small serving engine: a transformer with paged attention, chunked prefill, continuous batching, greedy decoding."""
