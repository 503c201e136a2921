"""From a checkpoint to an engine: tracing, integer weights, comparison with PyTorch, benchmarks."""

from dvq_rt.packages import refuse_strangers

refuse_strangers("export", "training")
