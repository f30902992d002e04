"""Sizes of images in pixels: one number for a square, or [height, width] for a rectangle."""

from collections.abc import Sequence

ImageSize = int | Sequence[int]


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Return the height and the width of an image in pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def area(size: ImageSize) -> int:
    """Return the number of pixels of an image."""
    height, width = height_and_width(size)
    return height * width


def simplify(size: ImageSize) -> int | list[int]:
    """Return one number for a square, and a list for any other size.

    A square is thereby equal to itself, whichever way it is written.
    """
    if isinstance(size, int):
        return size
    return size[0] if len(size) == 2 and size[0] == size[1] else list(size)


def describe(size: ImageSize) -> str:
    """Return a size as text, "224" for a square and "64x256" for a height of 64 pixels."""
    return "x".join(map(str, [size] if isinstance(size, int) else size))


def check(key: str, size: ImageSize) -> None:
    """Raise ValueError, naming the key, unless the size is one number or two positive ones."""
    if not isinstance(size, int) and (len(size) != 2 or min(size) < 1):
        raise ValueError(
            f"{key}: {list(size)} is not a size; give one number for a square, or "
            "[height, width] in pixels"
        )
