"""Text for messages."""

from collections.abc import Sequence


def abbreviate(names: Sequence[str], num_shown: int = 5) -> str:
    """List the first few names, and the total count if there are more."""
    more = f", ... ({len(names)} in all)" if len(names) > num_shown else ""
    return ", ".join(names[:num_shown]) + more


def printable(text: str) -> str:
    r"""Escape control characters, and bytes of file names that are not text, such as \x1b."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
