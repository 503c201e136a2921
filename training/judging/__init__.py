"""Judging of tokenizers and engines on real images: the judges, the numbers, the pictures and tables."""
