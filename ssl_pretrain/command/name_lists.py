"""The lists of names that `ssl-pretrain list` prints."""

from collections.abc import Callable
from fnmatch import fnmatch

from ssl_pretrain.optim import optimizer_list
from ssl_pretrain.schema import key_reference, presets
from ssl_pretrain.schema.key_text import format_rows
from ssl_pretrain.system import program


def list_names(words: list[str]) -> str:
    """Return the list that the arguments name, restricted to a pattern if they have one.

    Raises:
        ValueError: If there is no such list, no name matches, or there are too many arguments.
    """
    usage = f"{program.command('list')} {'|'.join(LISTS)} [PATTERN]"
    if not words or words[0] not in LISTS or len(words) > 2:
        raise ValueError(f"list: got {' '.join(words) or 'nothing'}; use {usage}")
    pattern = words[1] if len(words) == 2 else "*"
    text = LISTS[words[0]](pattern if "*" in pattern else f"*{pattern}*")
    if not text:
        raise ValueError(
            f"list {words[0]}: none has {pattern!r} in its name; "
            f"`{program.command(f'list {words[0]}')}` lists all"
        )
    return text


def _list_methods(pattern: str) -> str:
    rows = {
        name: f"{method['paper']} {method['summary']}"
        for name, method in key_reference.methods().items()
        if fnmatch(name, pattern)
    }
    return format_rows(rows)


def _list_configs(pattern: str) -> str:
    rows = {}
    for name, path in presets.list_files().items():
        if fnmatch(name, pattern):
            header = presets.read_header(path)
            rows[name] = f"{header.title} Number: {header.numbers} Hardware: {header.hardware}"
    return format_rows(rows)


def _list_backbones(pattern: str) -> str:
    import timm

    return "\n".join(timm.list_models(pattern))


def _list_optimizers(pattern: str) -> str:
    return format_rows(
        {name: text for name, text in optimizer_list.summaries().items() if fnmatch(name, pattern)}
    )


LISTS: dict[str, Callable[[str], str]] = {
    "methods": _list_methods,
    "configs": _list_configs,
    "backbones": _list_backbones,
    "optimizers": _list_optimizers,
}
