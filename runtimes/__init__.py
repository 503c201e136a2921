"""What runs a graph: ONNX Runtime or TensorRT behind one protocol, by name. Nothing here knows images or tokens."""
