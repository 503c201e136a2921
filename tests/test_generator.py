"""Generator: its calls, and that an image depends on its seed, index, label and parameters alone."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from small_models import HEADS, engine_logits, ragged_tokens

import dvq_rt
from dvq_rt.codes import Codes, load_codes, save_codes
from dvq_rt.decoding import DecodeLoop
from dvq_rt.engine import Engine
from dvq_rt.generator import Generator
from dvq_rt.layout import TokenLayout, Tokens
from dvq_rt.results import Samples
from dvq_rt.sampling import SamplingParams, uniforms
from runtimes.errors import InputError
from runtimes.onnxruntime import OnnxRuntimeBackend
from training.checkpoint import Model

PLAIN, GUIDED = SamplingParams(), SamplingParams(temperature=0.8, guidance=1.5)
LABELS: list[int | str | None] = [0, "bee", None, "cat", 1, 2, None, "ant", 0, 1, 2, "bee", None]
OTHER: list[int | str | None] = [0, "ant", None, "bee", 1, 0, None, "cat", 0, None, 2, "ant", None]
"""``LABELS`` with every second one changed."""


def differing(one: Samples, other: Samples, indices: Sequence[int]) -> list[int]:
    """Which of the images have not the same codes and the same pixels."""
    pixels = one.to_numpy(), other.to_numpy()
    return [i for i in indices if one.codes[i] != other.codes[i] or (pixels[0][i] != pixels[1][i]).any()]


Fault = Callable[[DecodeLoop, str, int, Any], Any]


class Observed(Engine):
    """An engine that notes the slot of every image by its first random number, and whose controls may be changed."""

    def __init__(self, generator: Generator, fault: Fault | None = None, slots: int = 4) -> None:
        super().__init__(generator.path, generator.manifest, OnnxRuntimeBackend(threads=1), slots)
        self.slot_of: dict[float, int] = {}
        self.fault = fault

    def loop(self, slots: int) -> DecodeLoop:
        engine = self

        class Loop(DecodeLoop):
            def control(self, name: str, slot: int, value: Any) -> None:
                if name == "uniforms":
                    engine.slot_of[float(value[0, 0])] = slot
                super().control(name, slot, engine.fault(self, name, slot, value) if engine.fault else value)

        return Loop(self.backend, self.program("step"), self.table, slots)


# --- an image and its surroundings -----------------------------------------------------------------------------
@pytest.mark.parametrize("params", [PLAIN, GUIDED, SamplingParams(top_k=9, top_p=0.9, positions="drawn")])
def test_neighbours_change_nothing(params: SamplingParams, generator: Generator) -> None:
    """With the number of slots pinned an image keeps every bit beside other labels, in another slot, after waiting for
    one, in a batch that is partly empty, and as part of a range of its seed."""
    slots: list[list[int]] = []
    made = []
    for given, first in ((LABELS, 0), (OTHER, 0), (LABELS[:3], 0), (LABELS[1:], 1)):
        engine = Observed(generator)
        made.append(Generator.over(engine).sample(labels=given, seed=3, params=params, first=first))
        slots.append([engine.slot_of[float(uniforms(3, first + i, 1)[0, 0])] for i in range(len(given))])
    same = [i for i in range(len(LABELS)) if LABELS[i] == OTHER[i]]
    assert slots[0][1:] != slots[3], "no image changed its slot"
    assert max(slots[0]) < 4 < len(LABELS), "no image had to wait"
    assert differing(made[0], made[1], same) == []
    assert differing(made[0], made[2], range(3)) == []
    assert made[0].codes[1:] == made[3].codes and (made[0].to_numpy()[1:] == made[3].to_numpy()).all()
    assert len(differing(made[0], made[1], range(len(LABELS)))) >= 4, "labels do not matter to this model"


def test_logits_keep_every_bit(generator: Generator, plain_generator: Generator, mq_generator: Generator) -> None:
    """Both heads of one sequence at every position: in each slot, beside others and alone, for both lowerings and both
    families."""
    for engine in (generator.engine, plain_generator.engine, mq_generator.engine):
        rows = ragged_tokens(engine.layout, 6)
        orders = [list(range(6)), [5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3], [3], [1, 2]]
        logits = [engine_logits(engine, [rows[i] for i in order], 4) for order in orders]
        for order, other in zip(orders[1:], logits[1:], strict=True):
            for i, mine in zip(order, other, strict=True):
                for head in HEADS:
                    np.testing.assert_array_equal(logits[0][i][head], mine[head])


@pytest.mark.parametrize("kind", ["class", "plain", "mq"])
def test_number_of_slots_changes_no_image(kind: str, request: pytest.FixtureRequest) -> None:
    """200 images, drawn one by one, in pairs and eight at a time, have the same codes and pixels."""
    engine: Path = request.getfixturevalue(f"{kind}_engine")
    labels = [None] if kind == "plain" else LABELS
    given = [labels[i % len(labels)] for i in range(200)]
    made = [Generator(engine, slots=n, threads=1).sample(labels=given, seed=8, params=PLAIN) for n in (1, 2, 8)]
    assert differing(made[0], made[1], range(200)) == []
    assert differing(made[0], made[2], range(200)) == []
    assert len({tuple(c.codes.reshape(-1)) for c in made[0].codes}) == 200


def by_slot(loop: DecodeLoop, name: str, slot: int, value: Any) -> Any:
    """Random numbers of the slot instead of the image."""
    return uniforms(3, slot, loop.layout.max_length) if name == "uniforms" else value


def coupled(loop: DecodeLoop, name: str, slot: int, value: Any) -> Any:
    """A trace of the next slot's logits in this one's."""
    last = slot + 1 == loop.slots
    return {"partner": (slot + 1) % loop.slots, "partner_weight": 0.01 if last else 0.99}.get(name, value)


@pytest.mark.parametrize("fault", [by_slot, coupled])
def test_the_comparison_notices_faults(fault: Fault, generator: Generator) -> None:
    """Negative control of the tests above: an engine whose slots do matter to one another fails the comparison."""
    broken = Generator.over(Observed(generator, fault))
    one, other = (broken.sample(labels=given, seed=3, params=PLAIN) for given in (LABELS, OTHER))
    assert differing(one, other, [i for i in range(len(LABELS)) if LABELS[i] == OTHER[i]])
    eight = Generator.over(Observed(generator, fault, slots=8)).sample(labels=LABELS, seed=3, params=PLAIN)
    assert differing(one, eight, range(len(LABELS)))


def test_calls_are_independent(generator: Generator) -> None:
    """The buffers that a call leaves behind, longer images and guidance included, do not reach the next call."""
    first = generator.sample(2, seed=1, params=PLAIN)
    generator.sample(9, labels="cat", seed=2, params=GUIDED)
    assert differing(first, generator.sample(2, seed=1, params=PLAIN), range(2)) == []
    fresh = Generator(generator.path, slots=4, threads=1)
    assert differing(first, fresh.sample(2, seed=1, params=PLAIN), range(2)) == []


def test_threads_give_the_serial_results(generator: Generator) -> None:
    """Twelve calls of every kind on four threads at once, which share one batch, return what they return one after the
    other. Only the order in which the images of a stream end may be another one."""
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))

    def call(i: int) -> list[Any]:
        made = generator.sample(3 + i % 3, labels=i % 3, seed=i, params=(PLAIN, GUIDED)[i % 2])
        previews = list(generator.stream(2, labels="bee", seed=i, params=PLAIN, every=7))
        return [
            made.to_numpy().tolist(),
            [c.codes.tolist() for c in made.codes],
            [s.total for s in generator.score(made.codes)],
            sorted((p.index, np.asarray(p.image).tolist()) for p in previews if p.codes),
            [c.codes.tolist() for c in generator.encode(pictures)],
        ]

    serial = [call(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(12))) == serial


def test_a_failed_call_leaves_the_generator_usable(generator: Generator) -> None:
    """After refused arguments, an error in the caller's own function and an abandoned stream all is as before."""
    before = generator.sample(6, labels="ant", seed=4)

    def fail(done: int, total: int) -> None:
        raise RuntimeError("in the middle")

    for _ in range(3):
        with pytest.raises(InputError, match="unknown label 'emu'"):
            generator.sample(6, labels="emu")
        with pytest.raises(RuntimeError, match="in the middle"):
            generator.sample(6, labels="ant", seed=4, progress=fail)
        previews = generator.stream(6, labels="ant", seed=4, every=3)
        next(previews)
        previews.close()  # type: ignore[attr-defined]
    assert differing(before, generator.sample(6, labels="ant", seed=4), range(6)) == []


# --- the calls -------------------------------------------------------------------------------------------------
def test_sample(generator: Generator, tmp_path: Path) -> None:
    """What a sample holds: pictures, their codes and labels, the settings, a grid and files."""
    told: list[tuple[int, int]] = []
    made = generator.sample(7, labels="bee", seed=5, progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 7) for i in range(1, 8)]
    assert len(made) == len(made.images) == len(made.codes) == 7
    assert made.to_numpy().shape == (7, 16, 16, 3) and made.to_numpy().dtype == np.uint8
    assert made.images[0].mode == "RGB" and made.images[0].size == (16, 16)
    assert made.labels == [1] * 7 == [c.label for c in made.codes]
    assert made.seed == 5 and made.params == SamplingParams(temperature=0.8, guidance=1.5)
    assert made.grid(columns=7).size == (7 * 18 + 2, 20)
    paths = made.save(tmp_path / "made")
    assert [p.name for p in paths] == [f"0000{i}.png" for i in range(7)]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(p)) for p in paths]), made.to_numpy())
    np.testing.assert_array_equal(generator.decode(made.codes), made.to_numpy())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make folder .*file"):
        made.save(tmp_path / "file")


def test_labels(generator: Generator, plain_generator: Generator) -> None:
    """Names, indices and None mean the same alone and in a list; n follows the list; seeds and labels matter."""
    assert generator.class_names == ("ant", "bee", "cat")
    several = generator.sample(labels=["cat", 2, None, np.int64(0)], params=PLAIN)
    assert several.labels == [2, 2, None, 0] and len(several) == 4
    assert differing(several, generator.sample(4, labels=[2, "cat", None, "ant"], params=PLAIN), range(4)) == []
    assert len(generator.sample()) == 1 and generator.sample().labels == [None]
    one, two = generator.sample(labels="bee", params=PLAIN), generator.sample(labels="bee", seed=1, params=PLAIN)
    assert one.codes != two.codes and one.codes != generator.sample(labels="ant", params=PLAIN).codes
    assert plain_generator.class_names == () and plain_generator.sample(2).labels == [None, None]


@pytest.mark.parametrize("kind", ["generator", "mq_generator"])
def test_stream_ends_with_the_samples(kind: str, request: pytest.FixtureRequest) -> None:
    """Every image's previews gain cells, and the last one is exactly the image that ``sample`` draws. How many there
    are depends on how fast they are decoded."""
    generator: Generator = request.getfixturevalue(kind)
    made = generator.sample(6, labels=LABELS[:6], seed=2)
    previews = list(generator.stream(6, labels=LABELS[:6], seed=2, every=5))
    for i in range(6):
        mine = [p for p in previews if p.index == i]
        assert [p.progress for p in mine] == sorted(p.progress for p in mine)
        assert mine[-1].progress == 1
        assert [p.codes is None for p in mine] == [True] * (len(mine) - 1) + [False]
        assert mine[-1].codes == made.codes[i] and mine[-1].image == made.images[i]
        assert all(p.image.size == (16, 16) for p in mine)
    assert len(list(generator.stream(2, every=1000))) == 2


def test_encode_decode_reconstruct(generator: Generator, tmp_path: Path) -> None:
    """One picture or several, in every form and of any size, become codes, and codes become pictures."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels[:9] = 30
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = generator.encode([pixels, Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png")])
    assert all(c == found[0] for c in found) and generator.encode(pixels) == found[:1]
    assert found[0].layout == generator.layout and found[0].label is None
    assert 16 < found[0].length < 64 and set(found[0].grain.reshape(-1)) == {0, 1}
    decoded = generator.decode(found[0])
    assert decoded.shape == (1, 16, 16, 3) and decoded.dtype == np.uint8
    np.testing.assert_array_equal(generator.reconstruct(pixels), decoded)
    assert generator.reconstruct([pixels, Image.new("L", (50, 20), 80)]).shape == (2, 16, 16, 3)
    assert generator.encode([]) == [] and generator.decode([]).shape == (0, 16, 16, 3)


@pytest.mark.parametrize("kind", ["generator", "mq_generator"])
@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_stored_codes_decode_to_the_same_image(
    suffix: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Codes are the whole image: through a file they give the same pixels and the same likelihood."""
    generator: Generator = request.getfixturevalue(kind)
    made = generator.sample(3, labels=["ant", None, 2], seed=6)
    save_codes(tmp_path / f"codes{suffix}", made.codes)
    loaded = load_codes(tmp_path / f"codes{suffix}")
    np.testing.assert_array_equal(generator.decode(loaded), made.to_numpy())
    assert [s.total for s in generator.score(loaded)] == [s.total for s in generator.score(made.codes)]


# --- score -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def expected_score(model: Model, tokens: Tokens) -> NDArray[np.float64]:
    """Log-probabilities [T, 2] of a sequence's positions and contents, from the full forward and a grammar written
    down once more: a position is free or the end, a code stands beside a position, all else is forced."""
    layout, net = model.layout, model.transformer
    assert net is not None
    content, position, segment = (torch.from_numpy(part)[None] for part in tokens)
    following = (position if layout.first == "position" else content)[:, 1:]
    logits = net(content[:, :-1], position[:, :-1], segment[:, :-1], following)
    covered: set[int] = set()
    out = []
    for t in range(len(tokens.content) - 1):
        s = int(tokens.segment[t + 1])
        local = int(tokens.position[t + 1]) - layout.position_offset(s)
        if int(tokens.segment[t]) != s or local == layout.position_eos(s):
            allowed, codes = [local], [int(tokens.content[t + 1])]
        else:
            codes = list(range(layout.codebook_size))
        if int(tokens.segment[t]) == s:
            cells = layout.covered_cells(s)
            allowed = [p for p in range(layout.sides[s] ** 2) if covered.isdisjoint(cells[p].tolist())]
            if layout.covering and (s == 0 or not allowed):
                allowed.append(layout.position_eos(s))
            if local < layout.sides[s] ** 2:
                covered.update(cells[local].tolist())
        row = []
        for head, choices, taken in ((0, allowed, local), (1, codes, int(tokens.content[t + 1]))):
            chosen = logits[head][0, t, choices].double()
            row.append(float(torch.log_softmax(chosen, 0)[choices.index(taken)]))
        out.append(row)
        if len(covered) == layout.filled_cells:
            break
    return np.array(out)


def test_score_equals_pytorch(class_model: Model, generator: Generator) -> None:
    """The likelihood of every token, for all-coarse, mixed and all-fine images, with a label and without."""
    layout, rng = generator.layout, np.random.default_rng(0)
    several = generator.sample(4, labels=["ant", "cat", None, None], seed=3, params=PLAIN).codes
    for grain in (0, 1):
        codes = rng.integers(0, 32, (4, 4)).repeat(2, 0).repeat(2, 1) if grain == 0 else rng.integers(0, 32, (8, 8))
        several.append(Codes(codes, np.full((4, 4), grain), layout, label=1))
    for labels in (None, [0, 1, 2, 0, 1, 2]):
        scores = generator.score(several, labels)
        for i, (codes, score) in enumerate(zip(several, scores, strict=True)):
            want = expected_score(class_model, codes.tokens(labels[i] if labels else None))
            np.testing.assert_allclose(score.position, want[:, 0], rtol=0, atol=2e-4)
            np.testing.assert_allclose(score.content, want[:, 1], rtol=0, atol=2e-4)
            assert score.total == pytest.approx(want.sum(), abs=2e-3) and score.total < -10
    assert scores[4].content[-1] < 0 and len(scores[4].content) == 16
    assert generator.score([]) == []


def test_masked_score_equals_pytorch(mq_model: Model, mq_generator: Generator) -> None:
    """The same where the code comes first, then its cell; codes at another number of cells have no likelihood."""
    several = mq_generator.sample(3, labels=["ant", "cat", None], seed=3, params=PLAIN).codes
    several += mq_generator.encode([np.full((16, 16, 3), 30, np.uint8)])
    for codes, score in zip(several, mq_generator.score(several), strict=True):
        want = expected_score(mq_model, codes.tokens())
        assert len(score.content) == 25
        np.testing.assert_allclose(score.position, want[:, 0], rtol=0, atol=2e-4)
        np.testing.assert_allclose(score.content, want[:, 1], rtol=0, atol=2e-4)
    fewer = several[0].codes.copy()
    fewer[np.unravel_index(fewer.argmax(), fewer.shape)] = -1
    with pytest.raises(InputError, match="the maps hold 24 codes; this layout has 25 per image"):
        mq_generator.score(Codes(fewer, np.minimum(fewer, 0), mq_generator.layout))


def test_score_of_codes_from_another_layout(generator: Generator, plain_generator: Generator) -> None:
    """Codes of a model with other labels or another order are scored by this model's ids, not by theirs."""
    foreign = plain_generator.sample(2, seed=1).codes
    own = [Codes(c.codes, c.grain, generator.layout) for c in foreign]
    assert foreign[0].layout != generator.layout
    assert [s.total for s in generator.score(foreign)] == [s.total for s in generator.score(own)]
    assert [s.total for s in generator.score(foreign, "bee")] == [s.total for s in generator.score(own, 1)]
    assert generator.score(foreign)[0].total != generator.score(foreign, 0)[0].total
    labelled = generator.sample(1, labels="cat").codes
    with pytest.raises(InputError, match="label is 2; it must be None: the model has no labels"):
        plain_generator.score(labelled)


def test_codes_of_other_sizes_are_refused(generator: Generator) -> None:
    """Codes that cannot be this model's are named with both sizes, and so is what is no Codes at all."""
    other = Codes(np.zeros((4, 4), dtype=int), np.zeros((2, 2), dtype=int), TokenLayout(16, (2, 4)))
    for call in (generator.decode, generator.score):
        with pytest.raises(
            InputError, match=r"codebook of 16 and grids \(2, 4\).*; this model has a codebook of 32 and grids"
        ):
            call([other])
        with pytest.raises(InputError, match="got a ndarray; codes come from encode"):
            call([np.zeros((8, 8), dtype=int)])  # type: ignore[list-item]


def test_public_names() -> None:
    """What the documentation imports from the package is there."""
    assert dvq_rt.Generator is Generator and dvq_rt.SamplingParams is SamplingParams
    assert all(hasattr(dvq_rt, name) for name in dvq_rt.__all__)
