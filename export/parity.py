"""The parity check that every export ends with, and the golden values that let any machine repeat it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dvq_rt.engine import Engine
from dvq_rt.files import write_tensors
from dvq_rt.layout import TokenLayout
from dvq_rt.manifest import Manifest
from dvq_rt.sampling import SamplingParams
from dvq_rt.verify import free_params, verify
from export.torch_program import draw_tokens, teacher_forced
from runtimes.errors import ExportError
from runtimes.onnxruntime import OnnxRuntimeBackend
from training.checkpoint import Model
from training.sampling import sample_tokens

IMAGES, STEPS = 4, 24
LARGE = 100_000_000
"""Parameters from which the uncached oracle would take hours: two golden sequences then hold
random codes, and one free run is drawn with caches. Logits come from the uncached forward for every size."""


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
            the other sequences are random ones, since drawing takes long without a cache. They are whole, and some of
            the steps lie before the limit.
    """
    vae, net, layout = model.tokenizer, model.transformer, model.layout
    assert vae is not None and net is not None
    short = limit is not None and limit < layout.max_length
    count = 2 if short else IMAGES
    images = smooth_images(vae.config.image_size, count)
    codes, grain = vae.encode_maps(torch.from_numpy(images))
    decoded = vae.decode_maps(codes)

    drawn = SamplingParams(positions="drawn")
    large = limit is None and sum(t.numel() for t in net.state_dict().values()) > LARGE
    labels = [i % layout.starts for i in range(count)][: 2 if large else None]
    rows = random_rows(layout, labels) if short or large else sample_tokens(net, labels, drawn, seed=1)
    content, position = (padded([np.array(row[i]) for row in rows]) for i in range(2))
    length = content.shape[1]
    steps = np.unique(np.linspace(0, length - 2, STEPS).astype(np.int64))
    if short:
        assert limit is not None
        steps = np.union1d(steps, np.arange(0, min(limit, length - 1), 4))
    logits = {head: np.zeros((len(rows), len(steps), width), np.float32) for head, width in heads(model).items()}
    for i, (c, p) in enumerate(rows):
        reached = steps[steps < len(c) - 1]
        for head, values in zip(("position", "content"), teacher_forced(net, c, p), strict=True):
            logits[head][i, : len(reached)] = values[reached].numpy()

    free_labels, cells, free = [], [], []
    for i in range(1 if large else 2):
        label = labels[i]
        params = free_params(layout, model.defaults, label, few=limit is not None)
        if large and params.guidance == 1:
            tokens = draw_tokens(net, [label], params, seed=0, first_image=i)[0]
        else:
            tokens = sample_tokens(net, [label], params, seed=0, first_image=i, limit=limit)[0]
        coded = np.flatnonzero(np.array(tokens[0]) < layout.codebook_size)  # an engine is done with the last of them
        free.append([np.array(part if short else part[: coded[-1] + 1]) for part in tokens])
        free_labels.append(label)
        if limit is None:
            free_codes, free_grain = layout.to_map(*tokens)
            segments = layout.grain_of_cells(free_grain).clip(0)
            cells.append(free_codes.reshape(-1) + segments * layout.codebook_size)
    runs: dict[str, NDArray[np.generic]] = {
        f"free_{name}": padded([row[i] for row in free]) for i, name in enumerate(("content", "position"))
    }
    if limit is None:
        runs = {"free_cells": np.stack(cells).astype(np.int32)}
    return {
        "images": images,
        "codes": codes.numpy(),
        "grain": grain.numpy(),
        "decoded": decoded.numpy(),
        "content": content,
        "position": position,
        "steps": steps,
        "position_logits": logits["position"],
        "content_logits": logits["content"],
        "free_labels": np.array(free_labels, dtype=np.int64),
        **runs,
    }


def random_rows(layout: TokenLayout, labels: list[int]) -> list[tuple[list[int], list[int]]]:
    """Whole token sequences (content, joint position) with random codes at random places, one per label."""
    rng, found = np.random.default_rng(1), []
    for i, label in enumerate(labels):
        grain = np.zeros(layout.sides[0] ** 2, dtype=np.int64)
        if layout.kept is not None:
            grain[rng.permutation(grain.size)[layout.kept :]] = -1
        else:
            finer = rng.permutation(grain.size)[: grain.size * (i + 1) // (len(labels) + 1)]
            grain[finer] = rng.integers(1, layout.segments, finer.size) if layout.segments > 1 else 0
        tokens = layout.to_tokens(rng.integers(0, layout.codebook_size, layout.cells), grain, label)
        found.append((tokens.content.tolist(), tokens.position.tolist()))
    return found


def padded(rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Rows of any length side by side, int64 [N, longest], -1 after their end."""
    table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def heads(model: Model) -> dict[str, int]:
    """Width of both heads."""
    return {"position": model.layout.position_head, "content": model.layout.content_vocabulary}


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
