"""How many codes images have, by which their sequences are sorted."""

import numpy as np

from dvq_rt.layout import TokenLayout


def test_batches_of_two_grains_stay_as_they_were() -> None:
    """Runs that were started when lengths were numbers of fine cells go on with the same batches: sorted by the number
    of codes the images come in the same order, ties included."""
    grain = np.random.default_rng(0).integers(0, 2, (200, 4, 4)).astype(np.int8)
    counts, before = TokenLayout(16, (4, 8)).count_codes(grain), (grain != 0).sum((1, 2))
    assert len(np.unique(counts)) < 20  # there are ties
    assert np.array_equal(np.argsort(counts, kind="stable"), np.argsort(before, kind="stable"))


def test_counts_of_codes() -> None:
    """A cell has as many codes as its grain has cells there, a cell without a code none; the count is that of the
    image's token sequence without starts and ends."""
    grain = np.array([[[0, 1], [2, 0]], [[2, 2], [2, 2]]], dtype=np.int8)
    assert TokenLayout(16, (2, 4, 8)).count_codes(grain).tolist() == [1 + 4 + 16 + 1, 64]
    assert TokenLayout(16, (2,), kept=3).count_codes(np.array([[[0, -1], [0, 0]]], dtype=np.int8)).tolist() == [3]
    layout = TokenLayout(16, (2, 4))
    tokens = layout.to_tokens(np.zeros((4, 4), int), np.array([[0, 1], [0, 0]]), 0)
    assert (tokens.content < 16).sum() == layout.count_codes(np.array([[[0, 1], [0, 0]]], dtype=np.int8))[0] == 7
