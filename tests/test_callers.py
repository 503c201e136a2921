"""What callers hold: numbers, arrays, files and codes in the forms in which other libraries give them; ranges of a
seed, functions that are told and may cancel, generators that travel between processes."""

import io
import multiprocessing
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dvq_rt.codes import Codes
from dvq_rt.generator import Generator
from dvq_rt.results import Samples
from dvq_rt.sampling import SamplingParams, uniforms
from runtimes.errors import BackendError, InputError

PLAIN = SamplingParams()


@pytest.mark.parametrize(
    "label", [2, "cat", np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), np.str_("cat")], ids=repr
)
def test_one_label(label: Any, generator: Generator) -> None:
    """A label is a name or a whole number of whatever library."""
    assert generator.sample(labels=label, params=PLAIN).labels == [2]


@pytest.mark.parametrize(
    "labels",
    [["ant", 2], ("ant", 2), np.array([0, 2]), torch.tensor([0, 2]), (i for i in ("ant", 2)), {"ant": 1, "cat": 2}],
    ids=lambda labels: type(labels).__name__,
)
def test_several_labels(labels: Any, generator: Generator) -> None:
    """Several labels are anything that gives them one by one; n follows their number."""
    assert generator.sample(labels=labels, params=PLAIN).labels == [0, 2]


def test_counts_of_other_libraries(generator: Generator) -> None:
    """Numbers of images, seeds and tokens may be NumPy's or PyTorch's; the result says plain ones."""
    made = generator.sample(np.int32(2), seed=np.uint64(3), first=torch.tensor(1), params=PLAIN)
    again = generator.sample(2, seed=3, first=1, params=PLAIN)
    assert made.codes == again.codes and len(list(generator.stream(1, every=np.int16(900)))) == 1
    assert isinstance(made.seed, int) and isinstance(made.first, int)


def test_images_in_every_form(generator: Generator, tmp_path: Path) -> None:
    """One picture as array, grey array, PIL, path, text, file in memory, tensor; several as a list, tuple, generator,
    array of four axes: all have the codes of the plain form."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = io.BytesIO((tmp_path / "a.png").read_bytes())
    one = generator.encode(pixels)
    for form in (Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png"), data, torch.from_numpy(pixels)):
        assert generator.encode(form) == one
    for several in ([pixels, pixels], (pixels, pixels), np.stack([pixels] * 2), (p for p in [pixels] * 2)):
        assert generator.encode(several) == one * 2
    grey = np.full((16, 16), 90, np.uint8)
    assert (
        generator.encode(grey)
        == generator.encode(np.repeat(grey[..., None], 3, -1))
        == generator.encode(grey[..., None])
    )
    assert generator.encode(np.zeros((0, 16, 16, 3), np.uint8)) == []


def test_codes_in_every_form(generator: Generator) -> None:
    """Samples, one image's codes, lists, tuples and generators of them go where codes go."""
    made = generator.sample(3, labels=["ant", None, 2], seed=6)
    totals = [s.total for s in generator.score(made.codes)]
    for form in (made, tuple(made.codes), (c for c in made.codes)):
        assert [s.total for s in generator.score(form)] == totals
    np.testing.assert_array_equal(generator.decode(made), made.to_numpy())
    np.testing.assert_array_equal(generator.decode(c for c in made.codes), made.to_numpy())
    np.testing.assert_array_equal(generator.decode(made.codes[1]), made.to_numpy()[1:2])


def test_results_behave_like_sequences(generator: Generator, mq_generator: Generator) -> None:
    """Samples and codes have a length and iterate; the text of samples is one short line."""
    made = generator.sample(12, seed=1, params=PLAIN)
    assert isinstance(made, Samples) and [*made] == made.images and made[3] == made.images[3] and len(made) == 12
    assert repr(made) == "Samples(12 images of 16x16, seed=1, first=0)"
    for codes in (made.codes[0], mq_generator.sample(1, params=PLAIN).codes[0]):
        tokens = codes.tokens().content
        assert sorted(code for *_, code in codes) == sorted(tokens[tokens < codes.layout.codebook_size])
        assert len(codes) == codes.length == len(list(codes))


@pytest.mark.parametrize("params", [PLAIN, SamplingParams(guidance=1.5)])
def test_a_range_of_a_seed(params: SamplingParams, generator: Generator, tmp_path: Path) -> None:
    """Images of a seed can be drawn in parts: number i is the same image, and the file of the same name."""
    whole = generator.sample(7, "bee", seed=9, params=params)
    parts = [generator.sample(n, "bee", seed=9, params=params, first=first) for first, n in ((0, 3), (3, 3), (6, 1))]
    assert [c for part in parts for c in part.codes] == whole.codes
    assert [p.name for p in parts[1].save(tmp_path)] == ["00003.png", "00004.png", "00005.png"]
    streamed = {p.index: p.codes for p in generator.stream(2, "bee", seed=9, params=params, first=5) if p.codes}
    assert streamed == dict(enumerate(whole.codes[5:]))
    assert whole.first == 0 and parts[2].first == 6


def test_every_token_is_told(generator: Generator) -> None:
    """The function hears of each token of each image but the one that completes it."""
    heard: list[tuple[int, int]] = []
    made = generator.sample(
        3, "ant", seed=2, params=PLAIN, on_token=lambda index, tokens: heard.append((index, tokens))
    )
    for i in range(3):
        counts = [tokens for index, tokens in heard if index == i]
        assert counts == list(range(1, len(counts) + 1)) and len(counts) >= made.codes[i].length - 1


def test_a_token_may_be_the_last(generator: Generator) -> None:
    """What the function raises cancels that call alone: other threads' images come as they would."""
    other: list[Samples] = []
    thread = threading.Thread(target=lambda: other.append(generator.sample(4, "cat", seed=5, params=PLAIN)))

    def stop(index: int, tokens: int) -> None:
        if tokens == 5:
            raise TimeoutError("out of time")

    thread.start()
    with pytest.raises(TimeoutError, match="out of time"):
        generator.sample(20, "ant", params=PLAIN, on_token=stop)
    thread.join()
    assert other[0].codes == generator.sample(4, "cat", seed=5, params=PLAIN).codes


def first_codes(generator: Generator) -> Codes:
    return generator.sample(1, "cat", seed=4, params=PLAIN).codes[0]


def test_generators_travel(generator: Generator) -> None:
    """A pickled generator opens its folder again, here and in a process of its own, with the same arguments."""
    again = pickle.loads(pickle.dumps(generator))
    assert again.engine.slots == generator.engine.slots and first_codes(again) == first_codes(generator)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_codes, (generator,)) == first_codes(generator)
    with pytest.raises(InputError, match=r"Generator\.over cannot be pickled; open the folder by its name"):
        pickle.dumps(Generator.over(generator.engine))


def test_options_of_onnxruntime(generator: Generator) -> None:
    """Whoever knows what he wants says which provider and session options run the graphs; they travel along."""
    options: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "session_options": {"intra_op_num_threads": 1}}
    own = pickle.loads(pickle.dumps(Generator(generator.path, slots=4, **options)))
    assert first_codes(own) == first_codes(generator)
    with pytest.raises(BackendError, match=r"providers is .*it must be a list of some of"):
        Generator(generator.path, providers=["NoSuchProvider"])


def test_closing(class_engine: Path) -> None:
    """A generator is a context manager; after it every call says so, and closing again does no harm."""
    with Generator(class_engine, threads=1) as one:
        assert len(one.sample(1)) == 1
    for call in (lambda: one.sample(1), lambda: one.stream(1), lambda: one.class_names, lambda: one.score([])):
        with pytest.raises(InputError, match="this generator is closed; make a new one"):
            call()
    one.close()


def test_random_numbers_are_made_when_an_image_starts(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for very many images makes the tables of those that are being drawn, and no others."""
    made: list[int] = []

    def counted(seed: int, image: int, length: int) -> Any:
        made.append(image)
        return uniforms(seed, image, length)

    monkeypatch.setattr("dvq_rt.decoding.uniforms", counted)
    previews = generator.stream(100_000, "ant", params=PLAIN, every=1)
    next(previews)
    previews.close()  # type: ignore[attr-defined]
    assert len(made) <= 2 * generator.engine.slots
