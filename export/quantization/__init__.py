"""Integer weights, caches and convolutions for ONNX Runtime, and the sequences that they are calibrated with."""
