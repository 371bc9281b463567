"""Models in memory: ONNX Runtime sessions, the batcher in front of each, and the pool that swaps them."""
