"""What clients send, as pydantic models: the OpenAI images API's fields, and this project's own beside them."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dvq_rt.decoding import Request
from dvq_rt.editing import Edit
from dvq_rt.generator import Generator
from dvq_rt.labels import read_label
from dvq_rt.sampling import SamplingParams
from dvq_rt.serve.engines import Served
from dvq_rt.serve.errors import ApiError

TUNING = tuple(SamplingParams.__dataclass_fields__)
MOST_PREVIEWS = 64


class Drawing(BaseModel):
    """Which images to draw, and how. What is left out of the sampling parameters keeps the engine's own value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="a model of GET /v1/models; the first of them if left out")
    prompt: str = Field("", description="the name of a label, or a text where the model takes prompts")
    negative_prompt: str = Field("", description="a text to draw away from, where the model takes prompts")
    label: str | int | None = Field(None, description="a label by name or index; in place of prompt, or beside a text")
    n: int = Field(1, ge=1, description="images; the server has a limit")
    size: str | None = Field(None, description="the model's own, such as 64x64, or auto")
    seed: int | None = Field(None, description="0 to 2**64 - 1; a random one, which the answer names, if left out")
    first: int = Field(0, description="number of the first image among those of the seed")
    output_format: Literal["png"] = "png"
    user: str | None = Field(None, description="taken and not used")
    temperature: float = Field(1.0, description="divides the logits")
    top_k: int | None = Field(None, description="most probable codes to draw among; null for all")
    top_p: float = Field(1.0, description="probability of the most probable codes to draw among")
    top_k_position: int | None = Field(None, description="as top_k, of the position head")
    top_p_position: float = Field(1.0, description="as top_p, of the position head")
    guidance: float = Field(1.0, description="weight of the label against no label; not 1 takes two slots an image")
    positions: str = Field("ordered", description="ordered or drawn")
    stream: bool = Field(False, description="server-sent events: previews, coarse to fine, then the images")
    partial_images: int = Field(0, ge=0, le=MOST_PREVIEWS, description="most previews of each image, with stream")
    with_codes: bool = Field(False, description="whether each image comes with its codes")

    def params(self, generator: Generator) -> SamplingParams:
        """The engine's recommended parameters, but for those that the request gives."""
        given = {name: getattr(self, name) for name in TUNING if name in self.model_fields_set}
        return SamplingParams.from_dict({**generator.manifest.defaults, **given})

    def check(self, served: Served, most: int) -> None:
        """
        Raises:
            ApiError: there are more images than ``most``, or of another size than the model's.
        """
        if self.n > most:
            raise ApiError(
                400, f"n is {self.n}; this server draws at most {most} a request", param="n", code="invalid_value"
            )
        side = served.generator.manifest.image_size
        if self.size not in (None, "auto", f"{side}x{side}"):
            raise ApiError(
                400,
                f"size is {self.size[:40]!r}; {served.name} draws {side}x{side} alone: leave it out",
                param="size",
                code="invalid_value",
            )

    def drawn(self, generator: Generator, edit: Edit | None = None) -> list[Request]:
        """The images as requests, with as many previews as are wanted."""
        seed = secrets.randbits(32) if self.seed is None else self.seed
        every = max(1, generator.layout.max_length // (self.partial_images + 1)) if self.partial_images else 0
        options = {"first": self.first, "every": every, "edit": edit, **self.subject(generator)}
        return generator.requests(self.n, seed=seed, params=self.params(generator), **options)

    def subject(self, generator: Generator) -> dict[str, Any]:
        """What is to be drawn, as arguments of ``Generator.requests``."""
        # forms have texts alone
        label = read_label(self.label, generator.class_names) if isinstance(self.label, str) else self.label
        if generator.takes_prompts:
            return {"labels": label, "prompts": self.prompt or None, "negative_prompts": self.negative_prompt or None}
        if self.negative_prompt:
            raise ApiError(400, "this model takes no prompts; leave negative_prompt out", param="negative_prompt")
        if self.prompt and self.label is not None:
            raise ApiError(400, "prompt and label both name a label; give one of them", param="label")
        return {"labels": label if label is not None else self.prompt or None}


class Generation(Drawing):
    """Body of ``POST /v1/images/generations``."""

    response_format: Literal["b64_json", "png"] = Field("b64_json", description="png answers with the one image itself")

    async def requests(self, served: Served, most: int) -> list[Request]:
        """The images as requests, checked.

        Raises:
            ApiError, InputError: a value cannot be drawn; nothing is.
        """
        self.check(served, most)
        if self.response_format == "png" and (self.n > 1 or self.stream):
            raise ApiError(400, "png answers with one image; use b64_json for several or for a stream", param="n")
        return await served.engine.run(partial(self.drawn, served.generator))


class Edition(Drawing):
    """Fields of ``POST /v1/images/edits`` beside its files, ``image`` and ``mask``."""

    response_format: Literal["b64_json"] = "b64_json"
    grain: Literal["free", "keep"] = Field("free", description="whether the grain of what is redrawn may change")
