"""Which nodes of a graph ONNX Runtime has kernels for on CUDA, looked up at export without a GPU."""
