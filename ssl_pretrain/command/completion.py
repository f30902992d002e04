"""Completion of command lines in a shell."""

HIDDEN_COMMAND = "__complete"


def script(words: list[str]) -> str:
    """Return the completion script of a shell."""
    raise ValueError("completion: not available yet")


def complete(words: list[str]) -> list[str]:
    """Return the words that may follow."""
    return []
