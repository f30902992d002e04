"""Read the images of a request into memory, within limits.

Up to twice the bytes that are counted are in memory while a body is copied.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ssl_pretrain.eval.serving.refusals import Refusal, overloaded

MAX_OVERHEAD = 64 << 10  # bytes of a form that belong to no file: boundaries, headers, other fields
DISCARD_SECONDS = 2.0  # time to read the rest of a body that was refused
MAX_PARTS = 16  # parts of a form, of which two at most are images


class ByteBudget:
    """Bytes of all uploads that are in memory at a time."""

    def __init__(self, num_bytes: int):
        self._free = num_bytes

    def take(self, num_bytes: int) -> None:
        """Reserve bytes, or refuse the request if too many uploads are in memory."""
        if num_bytes > self._free:
            raise overloaded("The service holds as many uploads as its memory allows.")
        self._free -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Release bytes."""
        self._free += num_bytes


@dataclass
class Upload:
    """The body of a request, which holds its bytes of the budget until it is closed.

    Attributes:
        max_bytes: Largest number of bytes per image.
        budget: Budget of all uploads.
        timeout_seconds: Longest time until the whole body has arrived.
    """

    max_bytes: int
    budget: ByteBudget
    timeout_seconds: float
    num_bytes: int = field(default=0, init=False)

    def __enter__(self) -> "Upload":
        """Return the upload, which is empty."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release the bytes."""
        self.budget.give_back(self.num_bytes)
        self.num_bytes = 0

    async def read_images(
        self, headers: Mapping[str, str], stream: AsyncIterator[bytes], names: tuple[str, ...]
    ) -> list[bytes]:
        """Return the images of the form fields `names`. A single image may also be the raw body.

        Raises:
            Refusal: If a field is missing or unknown, the body is too large, or it arrives too
                slowly.
        """
        kind, boundary = _parse_content_type(headers.get("content-type", ""))
        is_form = kind == "multipart/form-data"
        if not is_form and len(names) > 1:
            raise Refusal(
                422,
                f"The body is {kind or 'of no stated type'}, but this route takes two images.",
                f"Send a form (multipart/form-data) with the files {' and '.join(names)}.",
            )
        if is_form and not boundary:
            raise Refusal(
                422,
                "The form has no boundary in its Content-Type.",
                "Let the HTTP client write the Content-Type of the form.",
            )
        limit = self.max_bytes * len(names) + (MAX_OVERHEAD if is_form else 0)
        try:
            declared = headers.get("content-length", "")
            if declared.isdecimal() and int(declared) > limit:
                raise self._too_large("The body", limit)
            async with asyncio.timeout(self.timeout_seconds):
                if is_form:
                    return await self._read_form(boundary, stream, names, limit)
                return [await self._read_raw(stream, limit)]
        except Refusal:
            if "expect" not in headers:  # a client that expects an answer first sends nothing else
                await _discard(stream, limit)
            raise
        except TimeoutError:
            raise Refusal(
                408,
                f"The body did not arrive within {self.timeout_seconds:g} seconds.",
                "Send it faster, or start the service with a larger --timeout.",
            ) from None

    async def _read_raw(self, stream: AsyncIterator[bytes], limit: int) -> bytes:
        content = bytearray()
        async for chunk in stream:
            self._count(chunk, limit)
            content += chunk
        return bytes(content)

    async def _read_form(
        self, boundary: bytes, stream: AsyncIterator[bytes], names: tuple[str, ...], limit: int
    ) -> list[bytes]:
        from python_multipart.exceptions import FormParserError

        try:
            form = _Form(boundary)
            async for chunk in stream:
                self._count(chunk, limit)
                form.feed(chunk)
            form.finish()
        except FormParserError as error:
            raise Refusal(
                422,
                f"The form is damaged: {str(error).rstrip('.')}.",
                "Let an HTTP client write the form.",
            ) from None
        contents = [content for name, content in form.parts]
        form_names = [name for name, _ in form.parts]
        if sorted(form_names) != sorted(names):
            raise Refusal(
                422,
                f"The form has {_describe(form_names)}, but this route takes "
                f"{_describe(list(names))}.",
                f"Send {'one file' if len(names) == 1 else 'one file each'} as "
                f"{' and '.join(names)}.",
            )
        images = dict(zip(form_names, contents))
        for name in names:
            if len(images[name]) > self.max_bytes:
                raise self._too_large(name, self.max_bytes)
        return [bytes(images[name]) for name in names]

    def _count(self, chunk: bytes, limit: int) -> None:
        """Add the bytes of a chunk, and refuse the request above a limit."""
        if self.num_bytes + len(chunk) > limit:
            raise self._too_large("The body", limit)
        self.budget.take(len(chunk))
        self.num_bytes += len(chunk)

    def _too_large(self, name: str, limit: int) -> Refusal:
        return Refusal(
            413,
            f"{name} has more than {limit:,} bytes.",
            f"Send images of at most {self.max_bytes:,} bytes, or start the service with a larger "
            "--max-bytes.",
        )


async def _discard(stream: AsyncIterator[bytes], max_bytes: int) -> None:
    """Read on for a moment. Many clients only read an answer after they have sent the body."""
    num_bytes = 0
    with suppress(TimeoutError, RuntimeError):  # the stream may be at its end
        async with asyncio.timeout(DISCARD_SECONDS):
            async for chunk in stream:
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    break


def _describe(names: list[str]) -> str:
    if not names:
        return "no field"
    return f"the field{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _parse_content_type(header: str) -> tuple[str, bytes]:
    """Return the type and the boundary of a Content-Type."""
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(header)
    return kind.decode("latin-1").lower(), options.get(b"boundary", b"")


class _Form:
    """Parts of a form, collected while it arrives.

    Attributes:
        parts: Name and content of each part, in the order of the form.
    """

    def __init__(self, boundary: bytes):
        from python_multipart import MultipartParser

        self.parts: list[tuple[str, bytearray]] = []
        self._header_name, self._header_value = bytearray(), bytearray()
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_part_data": self._add,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
        }
        self._parser = MultipartParser(boundary, callbacks)

    def feed(self, chunk: bytes) -> None:
        """Parse the next bytes of the body."""
        self._parser.write(chunk)

    def finish(self) -> None:
        """Refuse a form whose end is missing."""
        from python_multipart.multipart import MultipartState

        self._parser.finalize()
        if self._parser.state != MultipartState.END:
            raise Refusal(422, "The form is cut off.", "Send it again.")

    def _begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise Refusal(
                422, f"The form has more than {MAX_PARTS} parts.", "Send only the images."
            )
        self.parts.append(("", bytearray()))

    def _add(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1][1].extend(data[start:end])

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        from python_multipart.multipart import parse_options_header

        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header_value))
            name = options.get(b"name", b"").decode("utf-8", "replace")
            self.parts[-1] = (name, self.parts[-1][1])
        self._header_name, self._header_value = bytearray(), bytearray()
