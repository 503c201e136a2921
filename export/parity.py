"""The parity check that every export ends with, and the golden values that let any machine repeat it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dvq_rt.generator import Generator
from dvq_rt.manifest import Manifest, write_tensors
from dvq_rt.sampling import SamplingParams
from dvq_rt.verify import verify
from runtimes.errors import ExportError
from training.checkpoint import Model
from training.sampling import sample_tokens

IMAGES, STEPS = 4, 24


def check_engine(model: Model, folder: Path, manifest: Manifest) -> Manifest:
    """Compare the graphs in a folder with PyTorch and write ``golden.safetensors``.

    Returns:
        the manifest with the measured errors in ``tolerances``.

    Raises:
        ExportError: an error is over its bound (``dvq_rt.verify``); names all that are.
    """
    write_tensors(folder / "golden.safetensors", golden_values(model))
    generator = Generator.of_folder(folder, manifest)
    results = verify(generator)
    if bad := [f"{r.name}: {r.measured:.3g} (at most {r.bound:.3g})" for r in results if not r.ok]:
        raise ExportError("the exported graphs do not agree with PyTorch: " + "; ".join(bad))
    return replace(manifest, tolerances={r.name: r.measured for r in results})


@torch.no_grad()
def golden_values(model: Model) -> dict[str, NDArray[np.generic]]:
    """Inputs and PyTorch's outputs for ``dvq_rt.verify``: ragged sequences, all positions, both heads' logits."""
    vae, net, layout = model.tokenizer, model.transformer, model.layout
    assert vae is not None and net is not None
    images = smooth_images(vae.config.image_size, IMAGES)
    codes, grain = vae.encode_maps(torch.from_numpy(images))
    decoded = vae.decode_maps(codes)

    drawn = SamplingParams(positions="drawn")
    labels = [i % layout.starts for i in range(IMAGES)]
    rows = sample_tokens(net, labels, drawn, seed=1)
    length = max(len(content) for content, _ in rows)
    content = np.full((IMAGES, length), -1, dtype=np.int64)
    position = np.full((IMAGES, length), -1, dtype=np.int64)
    for i, (c, p) in enumerate(rows):
        content[i, : len(c)], position[i, : len(p)] = c, p
    steps = np.unique(np.linspace(0, length - 2, STEPS).astype(np.int64))
    logits = {head: np.zeros((IMAGES, len(steps), width), np.float32) for head, width in heads(model).items()}
    offsets = torch.tensor([layout.position_offset(s) for s in range(layout.segments)])
    for i, (c, p) in enumerate(rows):
        joint = torch.tensor(p)
        segment = (joint[:, None] >= offsets[1:]).sum(1)
        following = joint if layout.first == "position" else torch.tensor(c)
        out = net(torch.tensor(c)[None, :-1], joint[None, :-1], segment[None, :-1], following[None, 1:])
        reached = steps[steps < len(c) - 1]
        for head, values in zip(("position", "content"), out, strict=True):
            logits[head][i, : len(reached)] = values[0, reached].numpy()

    free_labels, cells = [], []
    defaults = SamplingParams.from_dict(model.defaults)
    for i in range(2):
        label = labels[i]
        params = defaults if layout.null_label and label < layout.classes else SamplingParams()
        tokens = sample_tokens(net, [label], params, seed=0, first_image=i)[0]
        free_codes, free_grain = layout.to_map(*tokens)
        segments = layout.grain_of_cells(free_grain).clip(0)
        free_labels.append(label)
        cells.append(free_codes.reshape(-1) + segments * layout.codebook_size)
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
        "free_cells": np.stack(cells).astype(np.int32),
    }


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
