"""Read the labels and the captions of samples, which are in .cls, .json and .txt."""

import json
import re
from contextlib import suppress
from typing import Any

from ssl_pretrain.data.caption_texts import clean_captions
from ssl_pretrain.data.tar.tar_members import Member, WindowReader

_MAX_TEXT_BYTES = 1 << 20  # largest label or JSON that is read
_MAX_LABEL_CHARACTERS = 200
_CAPTION_KEYS = ("caption", "captions", "text")


def read_text(reader: WindowReader, member: Member, name: str) -> str:
    """Return the text of a small member.

    Args:
        reader: Reader of the shard.
        member: The member.
        name: Name of the shard, for messages.

    Raises:
        ValueError: If the member is large.
    """
    if member.length > _MAX_TEXT_BYTES:
        raise ValueError(
            f"data.root: {name}: {member.name} has {member.length:,} bytes, which is too much for "
            "a label; write the shard again"
        )
    return reader.read(member.offset, member.length).decode("utf-8", "replace").strip()


def parse_label(text: str, member: Member, name: str) -> str:
    """Return a label as text, "" for none. Numbers get their shortest form.

    Raises:
        ValueError: If it is neither a number nor a name.
    """
    if len(text) > _MAX_LABEL_CHARACTERS or not text.isprintable():
        raise ValueError(
            f"data.root: {name}: the label in {member.name} at offset {member.header_offset:,} is "
            "neither a number nor the name of a class; write a number as text"
        )
    if re.fullmatch(r"[+-]?\d+", text):
        return str(int(text)) if int(text) >= 0 else ""
    return text


def label_text(value: object) -> str:
    """Return the label in a JSON as text, "" for a value that is no label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_label = isinstance(value, int | str) and not isinstance(value, bool)
    return str(value).strip() if is_label else ""


def parse_json(text: str, member: Member, name: str) -> dict[str, Any]:
    """Return the values of a JSON object, or nothing for another kind of value.

    Raises:
        ValueError: If the text is not JSON.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"data.root: {name}: {member.name} at offset {member.header_offset:,} is not valid "
            f"JSON: {error}; write the shard again"
        ) from None
    return values if isinstance(values, dict) else {}


def parse_captions(text: str) -> list[str]:
    """Return the captions in the text of a .txt, which is one caption, or of a .json."""
    if text.lstrip().startswith("{"):
        with suppress(ValueError):
            values = json.loads(text)
            if any(key in values for key in _CAPTION_KEYS):
                return _captions_in_json(values)
    return clean_captions(text)


def has_captions(values: dict[str, Any]) -> bool:
    """Return True if a sample's JSON has a caption."""
    return bool(_captions_in_json(values))


def _captions_in_json(values: dict[str, Any]) -> list[str]:
    """Return the captions under the first key that has any."""
    candidates = (clean_captions(values.get(key)) for key in _CAPTION_KEYS)
    return next(filter(None, candidates), [])
