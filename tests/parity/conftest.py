"""What the parity tests share: one thread, and a comparison that reports the largest error of every test."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

TOLERANCE = 2e-5  # of the tensor's largest absolute value; the reference's own noise is below 3.4e-6


class Check:
    """Compares tensors with reference values and remembers the largest relative error."""

    def __init__(self) -> None:
        self.worst, self.where, self.floats, self.integers = 0.0, "", 0, 0

    def same(self, name: str, got: Tensor, want: Tensor) -> None:
        """Integers or booleans: equal in every place."""
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        assert torch.equal(got.long(), want.long()), f"{name}: {int((got != want).sum())} of {want.numel()} differ"
        self.integers += 1

    def close(
        self, name: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE, scale: float | None = None
    ) -> None:
        """Floats: equal up to ``tolerance`` of ``scale`` (the reference's largest absolute finite value); infinite
        entries at the same places."""
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        finite = torch.isfinite(want)
        assert torch.equal(torch.isfinite(got), finite), f"{name}: finite at other places"
        assert torch.equal(got[~finite], want[~finite]), f"{name}: other infinite values"
        largest = want[finite].abs().max().item() if scale is None else scale
        error = (got[finite] - want[finite]).abs().max().item() / largest if largest else got[finite].abs().max().item()
        if error >= self.worst:
            self.worst, self.where = error, name
        assert error <= tolerance, f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}"
        self.floats += 1


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Iterator[Check]:
    """A Check that prints what it measured (``pytest -rA`` or ``-s`` shows it)."""
    made = Check()
    yield made
    error = f"largest relative error {made.worst:.1e} ({made.where})" if made.floats else "no floats"
    print(f"\nparity {request.node.name}: {error}; {made.floats} float and {made.integers} integer comparisons")
