"""From a checkpoint to an engine: tracing, integer weights, comparison with PyTorch, benchmarks."""
