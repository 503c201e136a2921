"""Judging of engines on real images: the classifier that is the judge, the numbers, the pictures and tables."""
