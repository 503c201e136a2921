"""The engines that ship with the package."""

import numpy as np
import pytest

from dvq_rt import Generator
from dvq_rt.manifest import DEMOS


@pytest.mark.parametrize(("demo", "most"), [("demo:dq", 21), ("demo:dq3", 16), ("demo:mq", 13)])
def test_demo_is_intact_and_small(demo: str, most: int) -> None:
    """Protects the bundled engines: every golden check passes on this machine, and the folder is at most so many MB."""
    for check in Generator(demo, threads=1).verify():
        print(f"\n{demo}, {check.name}: {check.measured:.3g} (at most {check.bound:.3g})", end="")
        assert check.ok, check
    assert sum(path.stat().st_size for path in DEMOS[demo].iterdir()) <= most * 1_000_000


@pytest.mark.parametrize("demo", DEMOS)
def test_demo_images_do_not_depend_on_the_slots(demo: str) -> None:
    """Protects reproducibility on trained weights: one by one, in pairs of slots and in a full batch the demo draws the
    same codes and pixels, with its recommended guidance; and its labels differ."""
    names = Generator(demo).class_names
    made = [Generator(demo, slots=slots).sample(labels=list(names), seed=11) for slots in (2, 5, 8)]
    for other in made[1:]:
        assert [c.codes.tolist() for c in other.codes] == [c.codes.tolist() for c in made[0].codes]
        np.testing.assert_array_equal(other.to_numpy(), made[0].to_numpy())
    assert len({image.tobytes() for image in made[0].images}) == len(names)


@pytest.mark.parametrize("demo", DEMOS)
def test_demo_reconstructs_what_it_draws(demo: str) -> None:
    """Protects the tokenizer's path: a sample's codes decode to the sample, and encoding it again changes little."""
    generator = Generator(demo)
    samples = generator.sample(labels=["flags", "clocks"], seed=2)
    np.testing.assert_array_equal(generator.decode(samples.codes), samples.to_numpy())
    again = generator.reconstruct(samples.images).astype(float)
    error = np.sqrt(np.mean((again - samples.to_numpy()) ** 2))
    print(f"\nencoding and decoding a sample again changes it by {error:.1f} grey levels (RMS)")
    assert error < 10  # real held-out images are 14 grey levels off (25.3 dB); a sample is already in the code's reach
