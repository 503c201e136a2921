"""The released code of both papers: its configurations, checkpoints, samplers and sizes, quirks included."""
