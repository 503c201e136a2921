"""Request bodies, read within limits of size and time; pictures, codes and forms in them."""

from __future__ import annotations

import asyncio
import io
import re
from email.parser import BytesHeaderParser
from email.policy import HTTP

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import Request

from dvq_rt.files import parse_json
from dvq_rt.images import image_size, square
from dvq_rt.serve.errors import ApiError
from dvq_rt.serve.settings import UPLOAD_SECONDS
from runtimes.errors import InputError, guard

OPAQUE = 128
"""Least alpha of a pixel of a mask that is kept."""
DISCARDED = 4
"""A body that is too large is read up to so many times the limit, so that its sender gets to read the answer."""
BOUNDARY = re.compile(r'multipart/form-data *;.*?boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70})).*', re.IGNORECASE)
MOST_PARTS, MOST_HEAD = 64, 2048
"""Parts of a form, and bytes of a part's header; the form is read in the thread that serves everybody."""


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 for more than ``limit`` bytes, 408 if it has not come within ``UPLOAD_SECONDS``.
    """
    too_large = ApiError(
        413,
        f"the body has more than {limit} bytes, the most that this server takes here; send a smaller one",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > DISCARDED * limit:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    body += chunk
                elif size > DISCARDED * limit:
                    break
                else:
                    body.clear()
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not come within {UPLOAD_SECONDS:g} seconds; send it faster, or a smaller one",
            code="body_too_slow",
            headers={"Connection": "close"},
        ) from None
    if size > limit:
        raise too_large
    return bytes(body)


def picture_file(body: bytes, pixels: int) -> io.BytesIO:
    """The file of a picture for ``dvq_rt.images``, which decodes it later; its size by its header is checked here.

    Raises:
        ApiError: it has more than ``pixels`` pixels.
        InputError: it is no picture.
    """
    if not body:
        raise InputError("the body is empty; send the bytes of a picture, as curl --data-binary @photo.jpg does")
    file = io.BytesIO(body)
    width, height = image_size(file)
    if width * height > pixels:
        raise ApiError(
            413,
            f"the image is {width} x {height} pixels; at most {pixels} in all are read: scale it down first",
            code="image_too_large",
        )
    return file


def clear_pixels(file: io.BytesIO, size: int) -> NDArray[np.bool_]:
    """Where a picture is transparent, bool [size, size], cropped and resized as ``dvq_rt.images.square`` does.

    Raises:
        InputError: it has no transparency, or cannot be decoded.
    """
    with guard(InputError, "the mask cannot be decoded"):
        picture = Image.open(file)
        if not picture.has_transparency_data:
            raise InputError("the mask has no transparency; make it a PNG that is transparent where to draw anew")
        alpha = picture.convert("RGBA").getchannel("A")
    return square(alpha, size) < OPAQUE


def json_body(body: bytes) -> object:
    """The value of a JSON body.

    Raises:
        InputError: it is none.
    """
    with guard(InputError, "the body is no JSON"):
        return parse_json(body)


def form(body: bytes, content_type: str) -> tuple[dict[str, str], dict[str, bytes]]:
    """Texts and files of a body of ``multipart/form-data``, by their names.

    Raises:
        InputError: it is no such body.
    """
    boundary = BOUNDARY.fullmatch(content_type)
    if boundary is None:
        raise InputError("the body must be multipart/form-data with the files image and mask")
    line = b"\r\n--" + (boundary[1] or boundary[2]).encode("latin-1")
    if body.count(line) > MOST_PARTS:
        raise InputError(f"the form has more than {MOST_PARTS} parts")
    texts, files = {}, {}
    with guard(InputError, "the form cannot be read"):
        for part in (b"\r\n" + body).split(line)[1:-1]:
            head, there, content = part.partition(b"\r\n\r\n")
            if not there or len(head) > MOST_HEAD:
                raise InputError(f"one of its parts has no header of at most {MOST_HEAD} bytes")
            disposition = BytesHeaderParser(policy=HTTP).parsebytes(head.removeprefix(b"\r\n"))["content-disposition"]
            if disposition is None:
                raise InputError("one of its parts has no header Content-Disposition")
            name = str(disposition.params["name"]).removesuffix("[]")
            if "filename" in disposition.params:
                files[name] = content
            else:
                texts[name] = content.decode("utf-8")
    return texts, files
