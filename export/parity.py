"""The parity check that every export ends with, and the golden values that let any machine repeat it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dvq_rt.editing import given_first
from dvq_rt.engine import Engine
from dvq_rt.files import read_tensors, write_tensors
from dvq_rt.labels import whole
from dvq_rt.layout import HEADS, TokenLayout, Tokens, padded
from dvq_rt.manifest import Manifest
from dvq_rt.sampling import SamplingParams
from dvq_rt.verify import draw_tokens, free_params, free_request, verify
from export.quantization.weights import QuantLinear
from runtimes.errors import ExportError
from runtimes.onnxruntime import OnnxRuntimeBackend
from training.checkpoint import Model
from training.frozen_text import frozen_of
from training.sampling import embed_prompts, sample_tokens
from training.torch_program import drawn_tokens, sample_events, teacher_forced

IMAGES, STEPS = 4, 24
LARGE = 100_000_000
"""Parameters from which drawing takes minutes even with caches: two golden sequences then hold random codes, and there
is one free run. Logits come from the uncached forward for every size."""
LARGE_NARROW, FEW_TOKENS, MOST_TOKENS = 50_000_000, 24, 2**31 - 1
"""Narrow engines of transformers of more parameters are compared on so few tokens, because this takes long on a CPU."""
ORACLE_TOKENS = 16
"""Tokens of each free run that the uncached sampler draws too."""


def check_limit(layout: TokenLayout, parameters: int, asked: int | None) -> int:
    """Tokens after which the comparison of a narrow engine stops: as asked, else all, or FEW_TOKENS of large models."""
    longest = layout.max_length
    if asked is not None:
        return min(whole("check_tokens", asked, 1, MOST_TOKENS), longest)
    return min(FEW_TOKENS, longest) if parameters > LARGE_NARROW else longest


def keep_drawn(engine: Engine) -> None:
    """Replace the golden free runs by those of ONNX Runtime, which has the same number format as the engine will."""
    golden = read_tensors(engine.path / "golden.safetensors")
    rows: dict[str, list[Any]] = {"free_position": [], "free_content": []}
    for i in range(len(golden["free_labels"])):
        count = int((golden["free_position"][i] >= 0).sum()) - 1
        tokens = draw_tokens(engine, free_request(engine, golden, i), count)
        for (name, runs), values in zip(rows.items(), tokens, strict=True):
            runs.append(np.concatenate([golden[name][i, :1], values[values >= 0]]))
    free = {name: padded(runs) for name, runs in rows.items()}
    write_tensors(engine.path / "golden.safetensors", {**golden, **free})


def check_engine(model: Model, folder: Path, manifest: Manifest, limit: int | None = None) -> Manifest:
    """Compare the graphs in a folder with PyTorch and write ``golden.safetensors``.

    Args:
        limit: see ``golden_values``; the comparison stops there too.

    Returns:
        the manifest with the measured errors in ``tolerances``.

    Raises:
        ExportError: an error is over its bound (``dvq_rt.verify``); names all that are.
    """
    write_tensors(folder / "golden.safetensors", golden_values(model, limit))
    results = verify(Engine(folder, manifest, OnnxRuntimeBackend()), limit)
    if bad := [f"{r.name}: {r.measured:.3g} (at most {r.bound:.3g})" for r in results if not r.ok]:
        raise ExportError("the exported graphs do not agree with PyTorch: " + "; ".join(bad))
    return replace(manifest, tolerances={r.name: r.measured for r in results})


@torch.no_grad()
def golden_values(model: Model, limit: int | None = None) -> dict[str, NDArray[np.generic]]:
    """Inputs and PyTorch's outputs for ``dvq_rt.verify``: ragged sequences, all positions, both heads' logits.

    Args:
        model: in float32.
        limit: None gives the cells of free runs. A number gives their tokens, at most so many; if images can be longer,
            the other sequences are random ones, since drawing takes long. They are whole, and some of the steps lie
            before the limit.

    Raises:
        ExportError: PyTorch with caches draws otherwise than without.
    """
    vae, net = model.both()
    layout = net.layout
    short = limit is not None and limit < layout.max_length
    large = limit is None and sum(t.numel() for t in net.state_dict().values()) > LARGE
    count = 2 if short else IMAGES
    labels = [i % layout.starts for i in range(count)]
    prompts = random_prompts(model, count)
    texts = read_prompts(model, prompts)
    embedded = embed_prompts(net, texts) if texts else []

    # encoder and decoder
    images = smooth_images(vae.config.image_size, count)
    codes, grain, scores, grain_codes = vae.encode_grains(torch.from_numpy(images))
    decoded = vae.decode_maps(codes)

    # logits along given sequences, at steps spread over the longest
    if short or large:
        rows = random_rows(layout, labels[:2])
    else:
        drawn = SamplingParams(positions="drawn")
        rows = [drawn_tokens(layout, event) for event in sample_events(net, labels, drawn, seed=1, prompts=embedded)]
    kinds: list[NDArray[np.int64] | None] = [None] * len(rows)
    if net.config.given:  # of every second sequence the left half comes first
        for i in range(0, len(rows), 2):
            rows[i], kinds[i] = given_first(layout, rows[i], half_given(layout))
    longest = max(len(row.content) for row in rows)
    steps = np.unique(np.linspace(0, longest - 2, STEPS).astype(np.int64))
    if limit is not None and short:
        steps = np.union1d(steps, np.arange(0, min(limit, longest - 1), 4))
    widths = {"position": layout.position_head, "content": layout.content_vocabulary}
    logits = {head: np.zeros((len(rows), len(steps), widths[head]), np.float32) for head in HEADS}
    for i, row in enumerate(rows):
        reached = steps[steps < len(row.content) - 1]
        for head, values in teacher_forced(net, row, texts[i] if texts else None, kinds[i]).items():
            logits[head][i, : len(reached)] = values[reached].numpy()

    # free runs
    free_labels = labels[: 1 if large else 2]
    runs = [free_run(model, label, i, limit, embedded) for i, label in enumerate(free_labels)]
    free: dict[str, NDArray[Any]]
    if limit is None:
        free = {"free_cells": np.stack([cells for _, cells in runs])}
    else:
        free = {f"free_{head}": padded([getattr(tokens, head) for tokens, _ in runs]) for head in HEADS}
    return {
        "images": images,
        "codes": codes.numpy(),
        "grain": grain.numpy(),
        "scores": scores.numpy(),
        "grain_codes": grain_codes.numpy(),
        "decoded": decoded.numpy(),
        **{head: padded([getattr(row, head) for row in rows]) for head in HEADS},
        **({"kind": padded([np.zeros(1, np.int64) if k is None else k for k in kinds], 0)} if net.config.given else {}),
        "steps": steps,
        **{f"{head}_logits": values for head, values in logits.items()},
        "free_labels": np.array(free_labels, dtype=np.int64),
        **free,
        **({"prompts": padded(prompts), "prefix": prompt_table(embedded)} if prompts else {}),
    }


def random_prompts(model: Model, count: int) -> list[NDArray[np.int64]]:
    """Token ids of prompts of 12, 1, the most and 0 tokens, in turn; none for a model that reads none."""
    if (config := model.text) is None:
        return []
    vocabulary, rng = config.vocabulary or model.prompts().vocabulary, np.random.default_rng(0)
    lengths = [min(12, config.length), 1, config.length, 0]
    return [rng.integers(vocabulary, size=lengths[i % len(lengths)]) for i in range(count)]


def read_prompts(model: Model, prompts: list[NDArray[np.int64]]) -> list[NDArray[Any]]:
    """Token ids as the transformer takes them: those, or a frozen encoder's features."""
    frozen = frozen_of(model)
    return [ids if frozen is None else frozen.of(ids) for ids in prompts]


def half_given(layout: TokenLayout) -> NDArray[np.bool_]:
    """The left half of the coarsest cells, bool [h, w]."""
    side = layout.sides[0]
    return np.arange(side**2).reshape(side, -1) % side < side // 2


def prompt_table(prompts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows of prompts below each other, [N, longest, C], 0 after their end."""
    table = np.zeros((len(prompts), max(map(len, prompts)), prompts[0].shape[1]), np.float32)
    for line, rows in zip(table, prompts, strict=True):
        line[: len(rows)] = rows
    return table


def free_run(
    model: Model, label: int, image: int, limit: int | None, prompts: list[NDArray[np.float32]]
) -> tuple[Tokens, NDArray[np.int32]]:
    """Tokens and cells of an image that PyTorch draws with caches, its beginning compared with the uncached sampler. Of
    integer weights it is not: where the last bit of a sum decides how an activation is rounded, a draw may turn.

    Raises:
        ExportError: the two differ.
    """
    _, net = model.both()
    empty = net.text is not None and net.text.config.empty
    params = free_params(net.layout, model.defaults, label, few=limit is not None, empty=empty)
    texts: dict[str, Any] = {"prompts": prompts[image : image + 1], "negatives": prompts[image + 1 : image + 2]}
    (event,) = sample_events(net, [label], params, first=image, limit=limit, **texts)
    tokens = drawn_tokens(net.layout, event)
    if any(isinstance(layer, QuantLinear) and layer.rounds for layer in net.modules()):
        return tokens, event.cells
    most = min(limit or ORACLE_TOKENS, ORACLE_TOKENS)
    (oracle,) = sample_tokens(net, [label], params, first_image=image, limit=most, **texts)
    for head, expected in zip(("content", "position"), oracle, strict=True):
        given = getattr(tokens, head)[: len(expected)].tolist()
        if given != expected[: len(given)]:
            raise ExportError(f"PyTorch draws other tokens with caches than without: {head} {given}, not {expected}")
    return tokens, event.cells


def random_rows(layout: TokenLayout, labels: list[int]) -> list[Tokens]:
    """Whole sequences of random codes at random places, one per label, with an evenly growing share of finer grains."""
    rng, cells = np.random.default_rng(1), layout.sides[0] ** 2
    shares = (cells * (i + 1) // (len(labels) + 1) / cells for i in range(len(labels)))
    return [
        layout.random_tokens(rng, label, layout.random_grain(rng, share))
        for label, share in zip(labels, shares, strict=True)
    ]


def smooth_images(size: int, count: int) -> NDArray[np.float32]:
    """Smooth pictures with a flat half and an edge, float32 [count, 3, size, size] in [-1, 1]."""
    rng = np.random.default_rng(0)
    axis = np.linspace(0, 2 * np.pi, size, dtype=np.float32)
    out = np.ones((count, 3, size, size), dtype=np.float32)
    for image in out:
        for channel in image:
            a, b, phase = rng.uniform(1, 6, 3)
            channel[size // 4 :, : size * 3 // 4] = np.sin(
                a * axis[size // 4 :, None] + b * axis[None, : size * 3 // 4] + phase
            )
    return out
