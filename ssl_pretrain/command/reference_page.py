"""The page `docs/reference/configuration.md`, written from the description of the keys."""

from collections.abc import Mapping
from typing import Any

from ssl_pretrain.schema.key_entries import NAME, SECTION, SECTIONS, Entries
from ssl_pretrain.schema.key_text import ON_RESUME, describe_range, describe_type, format_default

INTRODUCTION = """\
# Configuration reference

Every key of a run, with its type, default, unit, allowed values, and what a resumed run may change.
[The guide](../configuration.md) says how values are read and where they are set.
`ssl-pretrain help KEY` prints the same texts.

This page is generated from the code by `python -m ssl_pretrain.command.reference_files`.
"""
RUN_KEYS = "Keys of the run"


def render(reference: Mapping[str, Any]) -> str:
    """Return the text of the page.

    Args:
        reference: Keys and methods, as in `schema/reference.json`.
    """
    keys: Entries = reference["keys"]
    sections = {key: entry for key, entry in keys.items() if entry["type"] == SECTION}
    blocks = [INTRODUCTION, _render_section(RUN_KEYS, "Keys outside the sections.", "", keys)]
    for name, entry in sections.items():
        blocks.append(_render_section(name, entry["help"], f"{name}.", keys))
    blocks.append("## Methods\n\nThe section `method` also has the keys of its method.\n")
    for name, method in reference["methods"].items():
        introduction = f"{method['summary']}\n\n{method['paper']}"
        entries = {key: entry for key, entry in method["keys"].items() if key != "name"}
        heading = f'### <a id="method.{name}"></a>{name}\n\n{introduction}\n'
        blocks.append(heading + _render_keys(entries, "", f"method.{name}."))
    return "\n".join(blocks)


def _render_section(title: str, text: str, prefix: str, keys: Entries) -> str:
    entries = {
        key.removeprefix(prefix): entry
        for key, entry in keys.items()
        if key.startswith(prefix) and _is_listed(key.removeprefix(prefix), entry)
    }
    return f"## {title}\n\n{text}\n" + _render_keys(entries, prefix, prefix)


def _is_listed(name: str, entry: Mapping[str, Any]) -> bool:
    """Return True if a section lists a key: its own values, and those of sections by name.

    Args:
        name: The key without the prefix of the section.
        entry: Description of the key.
    """
    is_in_section = "." not in name or name.split(".")[1] == NAME
    return is_in_section and entry["type"] not in (SECTION, SECTIONS)


def _render_keys(entries: Entries, prefix: str, anchor_prefix: str) -> str:
    blocks = []
    for name, entry in entries.items():
        anchor = f'<a id="{_anchor(anchor_prefix + name)}"></a>'
        blocks.append(f"\n#### {anchor}`{prefix}{name}`\n\n{_render_key(entry)}\n")
    return "".join(blocks)


def _anchor(key: str) -> str:
    return key.replace("<", "").replace(">", "")


def _render_key(entry: Mapping[str, Any]) -> str:
    type_name = describe_type(entry).replace(" | ", "` or `")
    sentences = [entry["help"], describe_range(entry), ON_RESUME[entry["on_resume"]]]
    line = f"`{type_name}`, default `{format_default(entry)}`"
    return f"{line}\n\n{' '.join(filter(None, sentences))}"
