"""Request bodies, read within limits of size and time; pictures, codes and forms in them."""

from __future__ import annotations

import asyncio
import io
import re
from email.parser import BytesParser
from email.policy import HTTP

from starlette.requests import Request

from dvq_rt.files import parse_json
from dvq_rt.images import image_size
from dvq_rt.serve.errors import ApiError
from dvq_rt.serve.settings import UPLOAD_SECONDS
from runtimes.errors import InputError, guard

DISCARDED = 4
"""A body that is too large is read up to so many times the limit, so that its sender gets to read the answer."""


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
    if not content_type.startswith("multipart/form-data"):
        raise InputError("the body must be multipart/form-data with the files image and mask")
    head = b"Content-Type: " + content_type.encode("latin-1", "replace") + b"\r\n\r\n"
    texts, files = {}, {}
    with guard(InputError, "the form cannot be read"):
        for part in BytesParser(policy=HTTP).parsebytes(head + body).iter_parts():
            disposition = part["content-disposition"]
            name = re.sub(r"\[\]$", "", str(disposition.params["name"]))
            content = part.get_payload(decode=True)
            if not isinstance(content, bytes):
                raise InputError(f"the form's part {name} has parts of its own")
            if "filename" in disposition.params:
                files[name] = content
            else:
                texts[name] = content.decode("utf-8")
    return texts, files
