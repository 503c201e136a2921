"""Sampling parameters and random numbers."""

import math

import numpy as np
import pytest

from dvq_rt.sampling import SamplingParams, uniforms
from runtimes.errors import InputError

# Numbers times 2**24.
PINNED_0_0 = [[193722, 4052523], [1869415, 9469306], [8428531, 4657448]]
PINNED_1234_5 = [[9667787, 5364869], [7972484, 7009472]]
PINNED_MAX = [[11614651, 478079]]


def test_defaults_and_dict_round_trip():
    """Stored recommendations come back as the same parameters, and partial ones keep the defaults."""
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(7), guidance=2, positions="drawn")
    assert params.to_dict() == {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 1.0,
        "top_k_position": None,
        "top_p_position": 1.0,
        "guidance": 2.0,
        "positions": "drawn",
    }
    assert SamplingParams.from_dict(params.to_dict()) == params
    assert SamplingParams.from_dict({"top_p": 0.9}) == SamplingParams(top_p=0.9)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", math.nan, "1e-06"),
        ("temperature", math.inf, "1e-06"),
        ("temperature", 0, "1e-06"),
        ("temperature", -1.0, "1e-06"),
        ("temperature", "1", "1e-06"),
        ("temperature", True, "1e-06"),
        ("top_k", 0, "from 1"),
        ("top_k", -3, "from 1"),
        ("top_k", 2.0, "from 1"),
        ("top_k", 2**40, "from 1"),
        ("top_k_position", 0, "from 1"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.0001, "(0, 1]"),
        ("top_p", math.nan, "(0, 1]"),
        ("top_p_position", -0.5, "(0, 1]"),
        ("guidance", -0.1, "[0, 1000]"),
        ("guidance", math.inf, "[0, 1000]"),
        ("guidance", math.nan, "[0, 1000]"),
        ("positions", "random", "ordered"),
        ("positions", None, "ordered"),
    ],
)
def test_bad_values_are_named(field, value, words):
    """Every out-of-range parameter is refused with its name, value and range before anything is drawn."""
    with pytest.raises(InputError) as caught:
        SamplingParams(**{field: value})
    text = str(caught.value)
    assert text.startswith(f"{field} is {value!r}") and words in text


@pytest.mark.parametrize("field", SamplingParams.__dataclass_fields__)
def test_any_value_is_refused_in_few_words(field):
    """What is no number, or one of thousands of digits, is named in a short text, never with another error."""
    for value in (10**400, 10**10_000, -(10**5000), "x" * 10**7, [[0] * 10**6], b"1", 1j, object()):
        with pytest.raises(InputError, match=rf"^{field} is ") as caught:
            SamplingParams(**{field: value})
        assert len(str(caught.value)) < 600
        with pytest.raises(InputError, match=rf"{field} is "):
            SamplingParams.from_dict({field: value})


def test_numbers_of_other_libraries():
    """Scalars of NumPy, also as arrays without dimensions where an integer is meant, are plain numbers afterwards."""
    given = {"temperature": np.float16(0.5), "top_p": np.float64(0.5), "guidance": np.int8(2), "top_k": np.array(7)}
    params = SamplingParams(**given, top_k_position=np.uint64(3), positions=np.str_("drawn"))
    assert params == SamplingParams(
        temperature=0.5, top_p=0.5, guidance=2, top_k=7, top_k_position=3, positions="drawn"
    )
    kinds = [type(value) for value in params.to_dict().values()]
    assert kinds == [float, int, float, int, float, float, str]
    np.testing.assert_array_equal(uniforms(np.uint64(7), np.int32(3), np.array(5)), uniforms(7, 3, 5))
    for value in (np.array([0.5]), np.bool_(True), np.array(True), np.float64("nan"), np.array(["drawn", "ordered"])):
        for field in SamplingParams.__dataclass_fields__:
            with pytest.raises(InputError, match=f"^{field} is"):
                SamplingParams(**{field: value})


def test_unknown_names_are_refused():
    """A misspelt parameter is an error, not silently ignored; so is what holds no names at all."""
    with pytest.raises(InputError, match="temprature"):
        SamplingParams.from_dict({"temprature": 1.0})
    for bad in (None, [], "temperature", 3, [("temperature", 1.0)]):
        with pytest.raises(InputError, match=r"sampling parameters is .*object of named fields"):
            SamplingParams.from_dict(bad)


def test_uniforms_are_pinned():
    """The random stream never changes between versions: seeds keep their pictures."""
    bits = np.float32(2**24)
    assert (uniforms(0, 0, 3) * bits).astype(int).tolist() == PINNED_0_0
    assert (uniforms(1234, 5, 2) * bits).astype(int).tolist() == PINNED_1234_5
    assert (uniforms(2**64 - 1, 2**63 - 1, 1) * bits).astype(int).tolist() == PINNED_MAX


def test_uniforms_do_not_depend_on_length():
    """A number depends on (seed, image, step, head) alone, so a longer run draws the same start."""
    long = uniforms(7, 3, 5000)
    for length in (0, 1, 2, 3, 17, 4999):
        np.testing.assert_array_equal(uniforms(7, 3, length), long[:length])


def test_uniforms_differ_between_seeds_images_and_heads():
    """Neighbouring seeds, images and heads are independent streams, also with seed and image exchanged."""
    streams = [uniforms(s, i, 200)[:, h] for s, i in ((0, 0), (0, 1), (1, 0), (1, 1)) for h in (0, 1)]
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 0.3


def test_uniforms_are_in_range_and_even():
    """Numbers fill [0, 1) evenly and never round up to 1, where an inverse CDF would run off its end."""
    values = uniforms(3, 0, 100_000)
    assert values.dtype == np.float32 and values.shape == (100_000, 2)
    assert values.min() >= 0 and values.max() < 1
    assert np.abs(values.mean(axis=0) - 0.5).max() < 0.01
    assert np.float32((2**24 - 1) * 2.0**-24) < 1  # the largest possible number
    assert np.array_equal(values * 2**24, np.rint(values * 2**24))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1, 0, 1), "seed"),
        ((2**64, 0, 1), "seed"),
        ((0.5, 0, 1), "seed"),
        ((True, 0, 1), "seed"),
        ((0, -1, 1), "image"),
        ((0, 2**63, 1), "image"),
        ((0, 0, -1), "length"),
    ],
)
def test_uniforms_check_their_arguments(arguments, name):
    """A seed or index outside the generator's key is refused instead of wrapping round."""
    with pytest.raises(InputError, match=f"^{name} is"):
        uniforms(*arguments)
