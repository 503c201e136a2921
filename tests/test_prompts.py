"""Prompts: a prefix of text in front of the image, in PyTorch, in the traced step, in engines and in training."""

import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from small_models import BOUND, MASKED, TOKENIZER, full_logits, ragged_tokens, relative_error, small_model

from dvq_rt import prompts as texts
from dvq_rt.__main__ import main
from dvq_rt.codes import Codes, load_codes, save_codes
from dvq_rt.decoding import DecodeLoop, Event, Request, Scheduler
from dvq_rt.engine import LOGITS, run_alone
from dvq_rt.generator import Generator
from dvq_rt.layout import HEADS, TokenLayout
from dvq_rt.manifest import read_engine
from dvq_rt.prompts import BYTES, TextTokenizer
from dvq_rt.publish import model_card
from dvq_rt.sampling import SamplingParams
from dvq_rt.step import PROMPT_PORTS
from export.graphs import TextGraph
from export.lowering import TENSORRT_OPSET, attention_for, scatter_attention
from export.tensorrt.check import check_graph
from export.to_onnx import export_onnx
from export.tracing import load_graph, trace
from runtimes.errors import BackendError, CheckpointError, ConfigError, DataError, DvqError, InputError
from runtimes.onnxruntime import OnnxRuntimeBackend
from training import evaluate_prompts
from training.checkpoint import Model, load_checkpoint, save_checkpoint
from training.data.captions import choose_caption, holds, train_bpe
from training.data.folder import ImageFolder
from training.evaluate_prompts import main as judge_prompts
from training.frozen_text import describe_frozen, frozen_of, load_frozen
from training.import_published import import_published
from training.judging.prompts import (
    COLOURS,
    by_word,
    families,
    foreground_colour,
    hue,
    in_two_styles,
    matching,
    nearest_word,
)
from training.models.text import TextConfig
from training.models.transformer import StackedTransformer, TransformerConfig
from training.prepare_coco import main as prepare_coco
from training.prepare_coco import prepare
from training.prompts import TextSettings, directed_images, hold_out, read_captions
from training.sampling import embed_prompts, sample_tokens
from training.step import Step, example_inputs, step_table
from training.torch_program import decode_loop, drawn_tokens, sample_events, teacher_forced
from training.train_transformer import main as train

LENGTHS = (12, 0, 16, 1)
"""Tokens of prompts side by side; 16 is the most."""
LIMIT = 14
"""Tokens after which drawing ends."""
LAYOUTS = {
    "two grains": TokenLayout(32, TOKENIZER.sides, classes=2, null_label=True),
    "three grains": TokenLayout(32, (2, 4, 8)),
    "kept cells": TokenLayout(**MASKED.layout(), classes=2, null_label=True),
}
GUIDED = SamplingParams(temperature=0.9, guidance=2.0)


def text_transformer(layout: TokenLayout, text: TextConfig | None = None) -> StackedTransformer:
    """Random weights, large enough that a prompt changes every draw."""
    torch.manual_seed(0)
    config = TransformerConfig(width=32, heads=4, position_blocks=1, content_blocks=1, block_size=layout.max_length)
    net = StackedTransformer(config, layout, text or TextConfig(length=16, vocabulary=256, blocks=1))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
        for table in (net.index_emb, net.text and net.text.place_emb):
            if table is not None:
                table.normal_(std=0.1)
    return net.eval().requires_grad_(False)


def token_ids(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(256, size=length) for length in lengths]


@pytest.fixture(scope="module", params=LAYOUTS)
def net(request: pytest.FixtureRequest) -> StackedTransformer:
    return text_transformer(LAYOUTS[request.param])


def labels_of(net: StackedTransformer, count: int = 4) -> list[int]:
    return [i % net.layout.starts for i in range(count)]


# --- PyTorch -------------------------------------------------------------------------------------------------------
def test_a_row_does_not_depend_on_the_batch(net: StackedTransformer) -> None:
    """The uncached forward gives a sequence the same logits alone and beside longer prompts; the empty prompt those of
    the model without any; and a prompt changes them."""
    rows, ids = ragged_tokens(net.layout, 4), token_ids(LENGTHS)
    plain = full_logits(net, rows[1])
    for row, prompt in zip(rows, ids, strict=True):
        alone = teacher_forced(net, row, prompt)
        wide = teacher_forced(net, row, np.concatenate([prompt, np.zeros(16 - len(prompt), np.int64)]))
        padded = net(
            *(torch.from_numpy(part)[None, :-1] for part in row),
            torch.from_numpy(net.layout.following(row))[None],
            torch.from_numpy(np.pad(prompt, (0, 16 - len(prompt)), constant_values=7))[None],
            torch.tensor([len(prompt)]),
        )
        for head, values in zip(HEADS, padded, strict=True):
            assert relative_error(values[0].numpy(), alone[head].numpy()) < 1e-5
            assert len(prompt) == 16 or relative_error(wide[head].numpy(), alone[head].numpy()) > 1e-3
    for head, values in teacher_forced(net, rows[1], ids[1]).items():
        assert relative_error(values[: len(plain[head])].numpy(), plain[head]) < 1e-5


def test_cached_equals_full(net: StackedTransformer) -> None:
    """With caches, prompts of all lengths side by side: the logits of the uncached forward at every image token."""
    rows, ids = ragged_tokens(net.layout, 4), token_ids(LENGTHS)
    requests = [
        Request.along(net.layout, row, record=LOGITS, key=i, prompt=prompt)
        for i, (row, prompt) in enumerate(zip(rows, embed_prompts(net, ids), strict=True))
    ]
    events = {event.request.key: event for event in run_alone(decode_loop(net, 4), requests)}
    for i, (row, prompt) in enumerate(zip(rows, ids, strict=True)):
        full = teacher_forced(net, row, prompt)
        for head, name in zip(HEADS, LOGITS, strict=True):
            got = events[i].records[name]
            assert relative_error(got, full[head][: len(got)].numpy()) < BOUND


def test_without_text_nothing_changes() -> None:
    """A model without text has the step it had: no prompt among its tensors, caches as long as an image."""
    plain = step_table(small_model().both()[1])
    assert not {port.name for port in PROMPT_PORTS} & {port.name for port in plain.ports}
    assert plain.inputs[-1].shape[2] == plain.layout.max_length
    table = step_table(text_transformer(LAYOUTS["two grains"]))
    assert [p.shape for p in table.ports if p.name == "prefix"] == [("B", 16, 32)]
    assert table.inputs[-1].shape[2] == table.layout.max_length + 16
    assert type(table).from_dict(table.layout, table.to_dict(), 16) == table


# --- the traced step -----------------------------------------------------------------------------------------------
def traced_loop(net: StackedTransformer, folder: Path, slots: int, tensorrt: bool = False) -> DecodeLoop:
    """The decode loop over a step that ONNX Runtime runs: fused attention, or what TensorRT gets."""
    table, path = step_table(net), folder / "step.onnx"
    attention = scatter_attention if tensorrt else attention_for("cpu", "fp32")
    options: dict[str, Any] = {"fixed": True, "opset": TENSORRT_OPSET} if tensorrt else {}
    inputs = example_inputs(table, slots)
    names = {"outputs": [port.output for port in table.outputs], "names": [port.name for port in table.inputs]}
    trace(Step(net, attention).eval(), inputs, path=path, **names, **options)
    if tensorrt:
        check_graph(load_graph(path), table.to_dict()["caches"])
    backend = OnnxRuntimeBackend(threads=1)
    return DecodeLoop(backend, backend.load(path), table, slots)


@pytest.fixture(scope="module")
def loop(net: StackedTransformer, tmp_path_factory: pytest.TempPathFactory) -> DecodeLoop:
    """Four slots; of three grains the graph that TensorRT gets."""
    return traced_loop(net, tmp_path_factory.mktemp("step"), 4, tensorrt=net.layout.segments == 3)


traced = pytest.mark.parametrize("net", ["three grains", "kept cells"], indirect=True)
"""Two grains are traced by the export below, which compares them with PyTorch."""


def drawn(loop: DecodeLoop, requests: Sequence[Request]) -> list[Event]:
    return sorted(run_alone(loop, requests), key=lambda event: event.request.key)


def prompted(
    net: StackedTransformer, params: SamplingParams, lengths: Sequence[int], others: Sequence[int] = ()
) -> list[Request]:
    prompts = embed_prompts(net, token_ids(lengths))
    negatives = embed_prompts(net, token_ids(others, seed=1)) or [None] * len(prompts)
    rows = zip(labels_of(net, len(prompts)), prompts, negatives, strict=True)
    record: dict[str, Any] = {"record": ("content", "position", *LOGITS), "limit": LIMIT}
    return [
        Request(label, params, 5, i, key=i, prompt=prompt, negative=negative, **record)
        for i, (label, prompt, negative) in enumerate(rows)
    ]


@traced
@pytest.mark.parametrize("others", [None, (), (3, 16, 0, 12)], ids=["unguided", "guided", "negative prompts"])
def test_engine_equals_oracle(net: StackedTransformer, loop: DecodeLoop, others: Sequence[int] | None) -> None:
    """Tokens of the traced step are those of the uncached sampler: alone, guided against the empty prompt, and guided
    against prompts that are shorter and longer, so that either slot of a pair starts later."""
    params = SamplingParams() if others is None else GUIDED
    events = drawn(loop, prompted(net, params, LENGTHS, others or ()))
    labels = labels_of(net)
    prompts = embed_prompts(net, token_ids(LENGTHS))
    negatives = embed_prompts(net, token_ids(others or (), seed=1))
    expected = sample_tokens(net, labels, params, seed=5, limit=LIMIT, prompts=prompts, negatives=negatives)
    for event, (content, position) in zip(events, expected, strict=True):
        tokens = drawn_tokens(net.layout, event)
        assert len(tokens.content) > 4  # the engine ends with the last code, the oracle with the tokens after it
        for got, want in ((tokens.content, content), (tokens.position, position)):
            assert got.tolist()[: len(want)] == want[: len(got)]
    unprompted = sample_tokens(net, labels, params, seed=5, limit=LIMIT)
    assert [a != b for a, b in zip(expected, unprompted, strict=True)] == [bool(n) for n in LENGTHS] or others


@traced
def test_slots_are_independent(net: StackedTransformer, loop: DecodeLoop) -> None:
    """An image and its logits are the same, to the bit, alone and beside others of other prompts, guided or not, and
    when it takes slots of images that were left half-way."""
    guided = prompted(net, GUIDED, LENGTHS, (3, 16, 0, 12))
    plain = prompted(net, SamplingParams(), LENGTHS)
    wanted = [drawn(loop, [request])[0] for request in (*guided, *plain)]
    scheduler = Scheduler(loop)
    left = [scheduler.submit(replace(request, key=-1)) for request in (guided[2], guided[1])]
    for _ in range(20):
        scheduler.step()
    for handle in left:
        scheduler.cancel(handle)
    mixed = [replace(r, key=i) for i, r in enumerate((*guided, *plain))]
    for i in (0, 4, 1, 5, 6, 2, 7, 3):
        scheduler.submit(mixed[i])
    events = []
    while scheduler.busy:
        events += scheduler.step()
    assert len(events) == 8
    for event in events:
        want = wanted[event.request.key]
        assert (event.cells == want.cells).all()
        for name, values in event.records.items():
            assert np.array_equal(values, want.records[name]), name


# --- texts ---------------------------------------------------------------------------------------------------------
CAPTIONS = ["red heart", "blue heart", "two-thirty", "woman singer: dark skin tone", "man singer: light skin tone"]


def test_tokenizers() -> None:
    """The trained BPE does not depend on the captions' order, has tokens for any text, and like bytes ignores case and
    spaces; a text that is too long is refused with both numbers, or cut if asked."""
    source = train_bpe(CAPTIONS, 300)
    assert train_bpe(CAPTIONS[::-1], 300) == source
    for tokenizer in (TextTokenizer(source, 16), TextTokenizer(BYTES, 16)):
        assert tokenizer.encode("  Red\tHEART ").tolist() == tokenizer.encode("red heart").tolist()
        assert len(tokenizer.encode("")) == len(tokenizer.encode(" \n")) == 0
        assert len(tokenizer.encode("愛🙂")) and max(tokenizer.encode("愛🙂")) < tokenizer.vocabulary
        long = "abcdefgh " * 4
        with pytest.raises(InputError, match=r"has \d\d tokens; this model reads at most 16.*truncate=True"):
            tokenizer.encode(long)
        assert tokenizer.encode(long, truncate=True).tolist() == tokenizer.encode(long[:30], truncate=True).tolist()
        assert len(tokenizer.encode(long, truncate=True)) == 16
    assert len(TextTokenizer(source, 16).encode("red heart")) < 9


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and labels need nothing; prompts of a BPE name the extra."""
    source = train_bpe(CAPTIONS, 300)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert TextTokenizer(BYTES, 8).encode("ab").tolist() == [97, 98]
    with pytest.raises(BackendError, match=r"pip install 'dvq-rt\[text\]'"):
        TextTokenizer(source, 8)
    demo = Generator("demo:dq", threads=1)
    assert demo.sample(1, "faces").prompts == [None]  # labels alone read no text
    with pytest.raises(BackendError, match=r"pip install 'dvq-rt\[text\]'"):
        demo.sample(1, "faces", prompts="smiling face")


def test_captions() -> None:
    """Phrases are held by captions that have all their words, hyphens included; the number chooses among captions and
    templates alike."""
    assert holds("woman elf: medium-dark skin tone", ["elf woman"])
    assert not holds("woman elf: medium-dark skin tone", ["dark elf"])
    chosen = {choose_caption(("a", "b"), ("x {name}", "{name}"), n / 8) for n in range(8)}
    assert chosen == {"x a", "a", "x b", "b"} and choose_caption(("a",), (), 0.99) == "a"


# --- from images to pictures ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images with captions: a colour and a side that is bright."""
    folder = tmp_path_factory.mktemp("captioned")
    captions = {}
    for i in range(24):
        name, side = ("red", "green", "blue")[i % 3], ("left", "both")[i % 2]
        pixels = np.full((16, 16, 3), 40, np.uint8)
        pixels[:, : 8 if side == "left" else 16, i % 3] = 200 + i
        path = folder / ("even" if i % 2 else "odd") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        captions[path.relative_to(folder).as_posix()] = f"{name} {side}"
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a few steps of training with labels and text."""
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(Model(small_model().tokenizer), folder / "tokenizer")
    config = {
        "transformer": {"width": 32, "heads": 4, "position_blocks": 1, "content_blocks": 1},
        "training": {"steps": 3, "batch_size": 4, "validate_every": 3, "picture_every": 3, "checkpoint_every": 2},
        "text": {"length": 16, "vocabulary": 300, "blocks": 1, "templates": ["{name}", "a {name} one"]},
        "stage": {"min_psnr": -100, "val_fraction": 0.1, "hold_out": ["blue both"], "defaults": {"guidance": 2.0}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    arguments = [str(data), "--tokenizer", str(folder / "tokenizer"), "--config", str(folder / "config.json")]
    assert train([*arguments, "--out", str(folder / "run")]) is None
    assert train([*arguments, "--out", str(folder / "run"), "--resume", "--set", "training.steps=4"]) is None
    return folder / "run"


def test_what_training_leaves(run: Path, data: Path) -> None:
    """The checkpoint has the tokenizer of the training captions, with its hash; held-out captions were not seen."""
    model = load_checkpoint(run / "checkpoint")
    assert model.text == TextConfig(16, model.prompts().vocabulary, 1, empty=True)
    split = {Path(path).stem: side for path, _, side in map(json.loads, (run / "images.jsonl").open())}
    captions = json.loads((data / "captions.json").read_text())
    blue_both = {Path(path).stem for path, text in captions.items() if text == "blue both"}
    assert len(blue_both) == 4 and {split[stem] for stem in blue_both} == {"val"}
    damaged = run / "checkpoint" / "tokenizer.json"
    text = damaged.read_text()
    damaged.write_text(text + " ")
    with pytest.raises(DvqError, match=r"tokenizer\.json is damaged"):
        load_checkpoint(run / "checkpoint")
    damaged.write_text(text)


def test_images_by_their_captions(data: Path) -> None:
    """What is held out leaves training and joins the held-out images; directed images are named; a phrase that no
    caption has is an error."""
    folder = ImageFolder(data, 16, val_fraction=0.1)
    before = set(folder.val.tolist())
    hold_out(folder, ["green left"])
    assert not set(folder.train.tolist()) & set(folder.val.tolist()) and len(folder.train) + len(folder.val) == 24
    assert {folder.captions(i)[0] for i in set(folder.val.tolist()) - before} == {"green left"}
    assert {folder.captions(i)[0] for i in directed_images(folder, ["left"])} == {"red left", "green left", "blue left"}
    with pytest.raises(DataError, match=r"hold_out names 'purple', which no caption"):
        hold_out(folder, ["purple"])


def test_words_that_a_model_knows(data: Path) -> None:
    """Training on from another model keeps its text tokenizer, whatever the captions are."""
    source = train_bpe(["other words", "altogether other ones"], 300)
    found, sizes = read_captions(ImageFolder(data, 16), TextSettings(), None, source)
    assert found == source and sizes.vocabulary == TextTokenizer(source, 32).vocabulary


@pytest.fixture(scope="module")
def generator(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """The trained model's engine; the export compared it with PyTorch."""
    folder = tmp_path_factory.mktemp("engines") / "text"
    export_onnx(load_checkpoint(run / "checkpoint"), folder, slots=4)
    return Generator(folder, slots=4, threads=1)


def test_sampling_with_prompts(generator: Generator, tmp_path: Path) -> None:
    """An image depends on its own prompt, label and number alone; its prompt goes with its codes, into files and into
    scores."""
    words = ["red left", "", "blue both", "green"]
    samples = generator.sample(prompts=words, labels=[0, 1, None, 1], negative_prompts=["a b c d e", None, "x", ""])
    assert samples.prompts == words == [c.prompt for c in samples.codes]
    alone = generator.sample(prompts="blue both", negative_prompts="x", first=2)
    assert alone.codes[0] == samples.codes[2]
    assert generator.sample(prompts="red", negative_prompts="x", first=2).codes[0] != samples.codes[2]
    last = list(generator.stream(prompts="blue both", negative_prompts="x", first=2, every=8))[-1]
    assert last.codes == samples.codes[2]
    for name in ("codes.npz", "codes.json"):
        save_codes(tmp_path / name, samples.codes)
        assert load_codes(tmp_path / name) == samples.codes
    own, other = (generator.score(samples, prompts=given) for given in (None, "green"))
    assert own[3].total == other[3].total and own[0].total != other[0].total
    assert generator.takes_prompts and "at most 16 tokens" in str(generator.sample.__doc__) + "at most 16 tokens"


def test_edits_are_prompted(generator: Generator) -> None:
    """Calls that start from codes draw with their prompt, unless another one is given; frames have one too."""
    (codes,) = generator.sample(1, 1, seed=2, prompts="red left").codes
    mask = np.zeros((generator.layout.sides[0],) * 2, dtype=bool)
    mask[1:, 1:] = True
    (expected,) = generator.edit(codes, mask, seed=4).codes
    assert expected.prompt == "red left" != generator.edit(codes, mask, seed=4, prompts="blue").codes[0].prompt
    assert [*generator.stream(1, seed=4, edit=generator.edit_of(codes, mask))][-1].codes == expected
    cell = generator.manifest.image_size // generator.layout.sides[0]
    assert {c.prompt for c in generator.outpaint(codes, right=cell)[1]} == {"red left"}
    assert generator.refine(codes, ratio=1.0, prompts="blue", candidates=1).prompts == ["blue"]
    frames = generator.interpolate(1, 2, 3, labels=0, prompts="green", mix="tail").codes
    assert [frames[0], frames[-1]] == [generator.sample(1, 0, seed, prompts="green").codes[0] for seed in (1, 2)]


def test_shards_hold_prompts(generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bulk drawing gives image i the prompt whose turn it is, as ``sample`` draws it, also after a shard was lost; what
    the model cannot read is refused before a plan is written."""
    lines, folder = tmp_path / "lines", tmp_path / "out"
    lines.write_text("red left\n\nblue both\n", encoding="utf-8")
    words = ["sample", "--engine", str(generator.path), "--slots", "4", "--threads", "1", "--negative", "green", "-q"]
    command = [*words, "--n", "5", "--shard", "2", "--out", str(folder), "--prompt-file", str(lines)]
    assert main(command) == 0
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "shard-000001.tar").unlink()
    assert main(command) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    prompts = [["red left", "blue both"][i % 2] for i in range(5)]
    samples = generator.sample(prompts=prompts, negative_prompts="green")
    for i, image in enumerate(samples.images):
        with tarfile.open(folder / f"shard-{i // 2:06d}.tar") as archive:
            told, picture = (archive.extractfile(f"{i:08d}.{kind}") for kind in ("json", "png"))
            assert told and picture and json.load(told)["prompt"] == prompts[i]
            assert (np.asarray(Image.open(picture)) == np.asarray(image)).all()
    bad = [
        (["--prompt", "x y z " * 30], "at most 16"),
        (["--prompt-file", str(folder)], "cannot be read"),
        (["--n", "1", "--prompt-file", str(lines)], "2 prompts for 1 images"),
        (["--engine", "demo:mq", "--prompt", "a"], "reads none"),
    ]
    for more, told_words in bad:
        assert main([*words, "--shard", "2", "--out", str(tmp_path / "none"), *more]) == 2
        assert told_words in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_server_takes_prompts(generator: Generator) -> None:
    """A request without a negative prompt has none, and a model that needs a prompt can be served and scored."""
    pytest.importorskip("fastapi")
    from dvq_rt.serve.engines import Engines
    from dvq_rt.serve.forms import Generation
    from dvq_rt.serve.settings import Settings

    body = Generation(prompt="red left", label="1", guidance=1.0, seed=3)
    (request,) = body.drawn(generator)
    assert request.text == "red left" and request.label == 1 and request.negative is None
    engines = Engines(Settings(engines=(("text", str(generator.path)),), slots=4, threads=1))
    engine = engines.pick(None).generator.engine
    engine.manifest = replace(engine.manifest, conditioning={**engine.manifest.conditioning, "empty": False})
    engines.warm()
    engines.close()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompts": "a\0b"}, "NUL"),
    ({"prompts": "a\ud800"}, "surrogate"),
    ({"prompts": "x" * 10_000_000}, "10000000 characters; at most 10000"),
    ({"prompts": "x y z " * 30, "truncate": False}, "at most 16"),
    ({"prompts": ["a", "b"], "n": 3}, "2 prompts for 3 images"),
    ({"prompts": ["a", "b"], "labels": [0, 1, 0]}, "3 labels for 2 images"),
    ({"prompts": [], "n": None}, "0 prompts"),
    ({"prompts": 7}, "prompts is 7"),
    ({"prompts": b"red"}, "prompts is b'red'"),
    ({"prompts": ["a", 7]}, "a prompt is 7"),
    ({"negative_prompts": "a", "params": SamplingParams()}, "guidance above 1"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_prompts(generator: Generator, arguments: dict[str, Any], words: str) -> None:
    """What cannot be drawn is refused by name, before anything is drawn."""
    calls: list[int] = []
    with pytest.raises(InputError, match=words):
        generator.sample(**arguments, on_token=lambda image, tokens: calls.append(tokens))
    assert not calls


def test_models_that_need_or_read_none(generator: Generator, class_engine: Path) -> None:
    """Prompts to a model that reads none are refused; so is a missing one where the empty prompt was not trained."""
    with pytest.raises(InputError, match="reads none"):
        Generator(class_engine, threads=1).sample(prompts="a")
    engine = generator.engine
    engine.manifest, whole = (
        replace(engine.manifest, conditioning={**engine.manifest.conditioning, "empty": False}),
        (engine.manifest),
    )
    try:
        with pytest.raises(InputError, match="needs prompts"):
            generator.sample(params=SamplingParams())
    finally:
        engine.manifest = whole
    with pytest.raises(ConfigError, match="conditioning"):
        replace(whole, conditioning={"kind": "prefix"})
    with pytest.raises(InputError, match="a prompt is 3"):
        Codes(*(getattr(generator.sample().codes[0], name) for name in ("codes", "grain", "layout", "label")), 3)  # type: ignore[arg-type]


def test_command_line(generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts by the command line, a row of pictures each; ``inspect`` says how many tokens; errors are told."""
    engine, out = str(generator.path), tmp_path / "samples.png"
    words = ["--prompt", "red left", "--prompt", "blue", "--negative", "both", "--n", "2"]
    assert main(["sample", "--engine", engine, "--out", str(out), *words]) == 0 and out.exists()
    assert main(["inspect", engine]) == 0
    assert "at most 16 tokens of tokenizer.json; the empty one stands for anything" in capsys.readouterr().out
    assert main(["sample", "--engine", engine, "--out", str(out), "--prompt", "a b c d " * 9]) == 2
    assert "this model reads at most 16" in capsys.readouterr().err
    card = model_card(read_engine(generator.path), "owner/name", "mit")
    assert "pipeline_tag: text-to-image" in card and "| guidance | yes |" in card and 'prompts="..."' in card
    assert read_engine(generator.path).conditioning == {
        **{"kind": "prefix", "max": 16},
        **{"tokenizer": "tokenizer.json", "empty": True},
    }


def test_rows_of_prompts_are_kept(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is encoded once, and not more than so many are kept."""
    seen: list[int] = []
    monkeypatch.setattr(texts, "KEPT_PROMPTS", 2)
    reader = texts.PromptReader(TextTokenizer(BYTES, 8), lambda ids: (seen.append(len(ids)), np.zeros((1, 1)))[1])
    for text in ("a", "a", "bb", "a", "ccc", "bb"):
        reader.rows(text)
    assert seen == [1, 2, 3, 2] and reader.rows("  ") is None


def test_pictures_of_training_are_prompted(net: StackedTransformer) -> None:
    """PyTorch's own sampler takes prompts, and says so where guidance has nothing to compare with."""
    bare = text_transformer(TokenLayout(32, (4, 8)), TextConfig(16, 256, 1, empty=False))
    with pytest.raises(InputError, match="null label or the empty prompt"):
        sample_events(bare, [0], GUIDED)


# --- judging -------------------------------------------------------------------------------------------------------
def test_numbers_of_judging() -> None:
    """Ranks and margins of captions, captions that differ in one word, and the colour that is nearest."""
    scores = np.array([[-1.0, -5.0, -2.0], [-4.0, -3.0, -9.0]])
    assert matching(scores) == {
        **{"images": 2, "others": 2, "own_above_mean": 1.0, "margin": 2.25},
        **{"recall_at_1": 0.5, "recall_at_10": 1.0},
    }
    captions = ["red heart", "Blue heart", "green heart", "blue car", "red car", "elf: medium-dark tone"]
    assert families(captions, COLOURS) == {"{} heart": {"red": captions[0], "blue": captions[1], "green": captions[2]}}
    image = np.full((4, 4, 3), 255, np.uint8)
    image[0] = (200, 0, 0)
    assert foreground_colour(image).tolist() == [200, 0, 0] and hue(np.array([[0.0, 90.0, 0.0]])) == pytest.approx(120)
    real = {"red": np.array([255.0, 0, 0]), "blue": np.array([0.0, 0, 255])}
    hit, told = nearest_word(real, {"red": np.array([[200.0, 9, 9], [10, 10, 200]])})
    assert hit.tolist() == [True, False] and told["red"]["nearest"] == 0.5 and told["red"]["real_hue"] == 0
    row = {"real_hue": 350.0, "hue": 20.0, "real_brightness": 9.0, "brightness": 4.0}
    means = by_word([{"red": row}, {"red": {**row, "hue": 340.0, "brightness": 6.0}, "blue": row}])
    assert means["red"] == {"captions": 2, "hue_error": 20.0, "real_brightness": 9.0, "brightness": 5.0}


def test_the_command(run: Path, data: Path, tmp_path: Path) -> None:
    """The command reads what the run held out, leaves out of it what has no caption, judges a checkpoint as it does an
    engine, and writes numbers and pictures."""
    shutil.copytree(data, tmp_path / "data")
    rows = [json.loads(line) for line in (run / "images.jsonl").read_text().splitlines()]
    bare = next(path for path, _, side in rows if side == "val")
    captions = json.loads((data / "captions.json").read_text())
    (tmp_path / "data" / "captions.json").write_text(json.dumps({k: v for k, v in captions.items() if k != bare}))
    arguments = [str(run / "checkpoint"), str(tmp_path / "data"), "--run", str(run), "--out", str(tmp_path / "out")]
    few = ["--images", "2", "--samples", "1", "--param", "guidance=1"]
    assert judge_prompts([*arguments, *few, "--show", "red left", "blue"]) is None
    result = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert result["params"]["guidance"] == 1 and result["styles"] == {}
    assert result["captions"]["images"] == 2 and set(result["colours"]["captions"]) <= {"{} left", "{} both"}
    assert result["skin_tones"] == {} and (tmp_path / "out" / "combinations.png").exists()
    assert (tmp_path / "out" / "prompts.png").exists()
    assert (tmp_path / "out" / "words.png").exists() and result["colours"]["words"]["red"]["captions"] == 2


def test_styles_of_samples(data: Path, tmp_path: Path) -> None:
    """A sample counts where it is nearer to the real image of its own style than to that of the other, the styles are
    counted apart, and captions that are there in one style alone count for nothing."""
    captions = ["red both", "red both, flat", "both, flat", "family, girl", "family"]
    assert in_two_styles(captions) == [("red both", "red both, flat")]
    shutil.copytree(data, tmp_path / "data")
    paths = sorted(json.loads((data / "captions.json").read_text()))
    (tmp_path / "data" / "captions.json").write_text(json.dumps(dict(zip(paths, captions, strict=False))))
    folder = ImageFolder(tmp_path / "data", 16, val_fraction=0)
    drawn = {folder.captions(i)[0]: folder.pixels(i) for i in range(len(folder)) if folder.captions(i)}

    for styled in (True, False):  # the real image of each caption, or that without its style

        def draw(count: int, text: str, styled: bool = styled) -> NDArray[np.uint8]:
            return np.stack([drawn[text if styled else text.removesuffix(", flat")]] * count)

        numbers, ((title, pictures),) = evaluate_prompts.test_styles(draw, folder, 2)
        assert numbers == {"nearest": 0.5 + styled / 2, "plain": 1.0, "styled": float(styled), "captions": 1}
        assert title == "red both" and len(pictures) == 4


def test_coco(tmp_path: Path) -> None:
    """A captions file as COCO has them becomes a list that training reads, with all captions of each image; what is
    missing is named."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(images / f"{i}.png")
    rows = [{"image_id": i, "caption": f" number {i}\n{j}"} for i in range(12) for j in range(2)]
    names = [{"id": i, "file_name": f"{i}.png"} for i in range(13)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": names, "annotations": rows}))
    assert prepare_coco([str(tmp_path / "captions.json"), str(images), str(tmp_path / "out")]) is None
    folder = ImageFolder(tmp_path / "out" / "images.txt", 16)
    assert len(folder) == 12 and folder.captions(3) in [(f"number {i} 0", f"number {i} 1") for i in range(12)]
    rows.append({"image_id": 12, "caption": "no file"})
    (tmp_path / "captions.json").write_text(json.dumps({"images": names, "annotations": rows}))
    with pytest.raises(DataError, match=r"lacks 1 of 13 captioned images: 12\.png"):
        prepare(tmp_path / "captions.json", images, tmp_path / "other")
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(DataError, match="no file of captions"):
        prepare(tmp_path / "captions.json", images, tmp_path / "other")


def small_encoder(kind: str, folder: Path) -> Path:
    """A folder with a small CLIP or T5 of random weights, of width 32, and a tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "clip":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = transformers.CLIPTextConfig(vocab_size=300, max_position_embeddings=16, **sizes)
        encoder = transformers.CLIPTextModel(config)
    else:
        config = transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        encoder = transformers.T5EncoderModel(config)
    encoder.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(train_bpe(CAPTIONS, 300))
    return folder


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_frozen_encoders(kind: str, tmp_path: Path) -> None:
    """A small CLIP or T5 with random weights, from its folder: features do not depend on what lies behind the prompt,
    the traced graph gives PyTorch's rows, and another encoder in the folder is refused."""
    small_encoder(kind, tmp_path)
    frozen = load_frozen(tmp_path)
    net = text_transformer(LAYOUTS["three grains"], TextConfig(16, 0, 1, features=32))
    model = Model(None, net, text_tokenizer=frozen.tokenizer)
    model.text_encoder = describe_frozen(frozen)
    ids = model.prompts().encode("a red heart")
    (rows,) = embed_prompts(net, [frozen.of(ids)])
    example = {"ids": torch.zeros(1, 16, dtype=torch.long), "length": torch.ones(1, dtype=torch.long)}
    trace(TextGraph(net.text, frozen_of(model)).eval(), example, ["prefix"], tmp_path / "text.onnx", fixed=True)
    table = np.full((1, 16), 7, np.int64)
    table[0, : len(ids)] = ids
    program = OnnxRuntimeBackend(threads=1).load(tmp_path / "text.onnx")
    got = program.run({"ids": table, "length": np.array([len(ids)], np.int64)})["prefix"][0, : len(ids)]
    assert relative_error(got, rows) < 1e-5
    model.text_encoder["sha256"] = "0" * 64
    with pytest.raises(CheckpointError, match="another text encoder"):
        frozen_of(model)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_frozen_encoder_from_training_to_engine(kind: str, run: Path, data: Path, tmp_path: Path) -> None:
    """A model is trained on the features of a small random encoder and exported, which compares it with PyTorch; its
    engine draws by prompts without the encoder's folder."""
    encoder = small_encoder(kind, tmp_path / "encoder")
    config = json.loads((run.parent / "config.json").read_text())
    config["text"] = {"length": 16, "blocks": 1, "encoder": str(encoder)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--tokenizer", str(run.parent / "tokenizer"), "--config", str(tmp_path / "config.json")]
    assert train([str(data), *arguments, "--out", str(tmp_path / "run")]) is None
    model = load_checkpoint(tmp_path / "run" / "best")
    assert model.text_encoder["folder"] == str(encoder)
    export_onnx(model, tmp_path / "engine", slots=2)
    shutil.rmtree(encoder)
    generator = Generator(tmp_path / "engine", threads=1)
    assert all(check.ok for check in generator.verify())
    drawn = generator.sample(1, prompts="red left", seed=1)
    red, blue = (generator.score(drawn.codes, prompts=text)[0].total for text in ("red left", "blue both"))
    assert red != blue


@pytest.mark.parametrize(
    "target",
    [
        "models.stage2_dynamic.dqtransformer_t2i.Dualformer",
        "models.stage2.text2image_transformer.Text2ImageTransformer",
    ],
)
def test_released_text_classes(target: str, tmp_path: Path) -> None:
    """The released text-to-image classes are refused with the reason, before any file is read."""
    with pytest.raises(ConfigError, match="released code lacks its transformer, and no checkpoint of one was released"):
        import_published({"target": target, "params": {}}, tmp_path / "none.ckpt")
