"""The asynchronous generator: the same images as the plain one, without a thread for each that waits."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from dvq_rt.asynchronous import AsyncGenerator
from dvq_rt.decoding import DecodeLoop
from dvq_rt.generator import Generator
from dvq_rt.results import Preview
from dvq_rt.sampling import SamplingParams
from runtimes.errors import BackendError, InputError


@pytest.fixture
def engine(generator: Generator) -> Iterator[AsyncGenerator]:
    yield AsyncGenerator(generator)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps take 10 ms; gives the list that a step adds to."""
    steps, step = [], DecodeLoop.step

    def later(loop: DecodeLoop) -> None:
        threading.Event().wait(0.01)
        steps.append(1)
        step(loop)

    monkeypatch.setattr(DecodeLoop, "step", later)
    return steps


def test_images_are_those_of_the_generator(engine: AsyncGenerator, generator: Generator) -> None:
    """Many calls at once, plain and guided, each get what they get alone, with no thread more than the batch's and the
    pool's; streams end with the same image, scores and codes are equal."""
    guided = SamplingParams(guidance=2.0)
    before = threading.active_count()
    most = 0

    async def work() -> list[Any]:
        nonlocal most
        calls = [engine.sample(2, "bee", seed, guided if seed % 2 else None, first=3) for seed in range(12)]
        tasks = [asyncio.create_task(call) for call in calls]
        while not all(task.done() for task in tasks):
            most = max(most, threading.active_count())
            await asyncio.sleep(0.001)
        streamed = [p async for p in engine.stream(2, ["ant", "cat"], seed=5, every=9) if p.codes is not None]
        codes = [p.codes for p in streamed]
        return [await asyncio.gather(*tasks), streamed, await engine.score(codes), await engine.decode(codes)]

    several, streamed, scores, pixels = run(work())
    assert most <= before + 3
    for seed, samples in enumerate(several):
        expected = generator.sample(2, "bee", seed, guided if seed % 2 else None, first=3)
        assert (samples.to_numpy() == expected.to_numpy()).all() and samples.codes == expected.codes
        assert (samples.labels, samples.seed, samples.params, samples.first) == ([1, 1], seed, expected.params, 3)
    expected = generator.sample(2, ["ant", "cat"], seed=5)
    by_index = {p.index: p for p in streamed}
    assert [by_index[i].codes for i in range(2)] == expected.codes
    assert [s.total for s in scores] == [s.total for s in generator.score([p.codes for p in streamed])]
    assert (pixels == generator.decode([p.codes for p in streamed])).all()


def test_edits_are_those_of_the_generator(engine: AsyncGenerator, generator: Generator) -> None:
    """A part of an image is drawn anew as ``edit`` and ``stream`` of the generator draw it, with the label of the codes
    that are kept."""
    codes, region = generator.sample(1, "bee", seed=3).codes[0], (0, 8, 16, 16)
    edit = generator.edit_of(codes, region=region, blend=False)

    async def work() -> tuple[Any, list[Preview]]:
        previews = [preview async for preview in engine.stream(2, seed=7, every=4, edit=edit)]
        return await engine.sample(2, seed=7, edit=edit), previews

    samples, previews = run(work())
    expected = generator.edit(codes, region=region, n=2, seed=7, blend=False)
    assert samples.codes == expected.codes and samples.labels == [1, 1]
    finished = {p.index: p for p in previews if p.codes is not None}
    assert len(previews) > 2 and [finished[i].codes for i in range(2)] == expected.codes
    assert all((np.asarray(finished[i].image) == image).all() for i, image in enumerate(expected.to_numpy()))


@pytest.mark.parametrize("streaming", [False, True])
def test_cancelling_frees_the_slots(streaming: bool, engine: AsyncGenerator, slow: list[int]) -> None:
    """A task that is cancelled, or a stream that is left, leaves no slot in use after the step under way."""
    batch = engine.generator.engine.batch

    async def work() -> None:
        if streaming:
            async with aclosing(engine.stream(40, every=2)) as previews:
                await anext(previews)
                assert batch.load.busy == 4
        else:
            task = asyncio.create_task(engine.sample(40))
            while batch.load.busy < 4:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        left = len(slow)
        while batch.load.busy:
            await asyncio.sleep(0.001)
        assert len(slow) <= left + 2

    run(work())


def test_errors_reach_the_caller(engine: AsyncGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad arguments, and what the backend raises, are raised where the call is awaited; the next call draws."""

    async def first(previews: AsyncIterator[Preview]) -> None:
        await anext(previews)

    with pytest.raises(InputError, match="unknown label 'wasp'"):
        run(engine.sample(1, "wasp"))
    with pytest.raises(InputError, match="every is 0"):
        run(first(engine.stream(1, every=0)))

    def broken(loop: DecodeLoop) -> None:
        raise BackendError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(DecodeLoop, "step", broken)
        with pytest.raises(BackendError, match="the device is gone"):
            run(engine.sample(3))
    assert len(run(engine.sample(3))) == 3


def test_closing_ends_the_calls(generator: Generator, slow: list[int]) -> None:
    """Closing while a call is drawn raises there."""

    async def work() -> None:
        engine = AsyncGenerator(Generator(generator.path, slots=2, threads=1))
        task = asyncio.create_task(engine.sample(50))
        while not slow:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.close)
        with pytest.raises(InputError, match="closed while images were being drawn"):
            await task

    run(work())
