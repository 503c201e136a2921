"""Training of both stages, judging of engines, and import of the released checkpoints. Needs PyTorch."""
