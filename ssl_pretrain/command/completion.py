"""Complete a command line from the generated files, for the shells' scripts."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.command.option_specs import read_specs
from ssl_pretrain.command.shell_scripts import SCRIPTS
from ssl_pretrain.command.subcommands import LOOK_UP, NAMES, SUBCOMMANDS
from ssl_pretrain.schema import config_file, key_reference, method_name, presets
from ssl_pretrain.schema.key_entries import NAME, SECTION, SECTIONS, Entries
from ssl_pretrain.schema.yaml_tree import value_at

HIDDEN_COMMAND = "__complete"
LISTS = ("methods", "configs", "backbones")
EVALUATION_KEYS = ("data.", "evaluation.")  # sections that an evaluation may override


def complete(words: list[str]) -> list[str]:
    """Return what the last word may become."""
    *previous, word = words or [""]
    with suppress(ValueError, OSError):  # an unfinished command line may be wrong
        return sorted(text for text in set(_candidates(previous, word)) if text.startswith(word))
    return []


def _candidates(previous: list[str], word: str) -> Iterable[str]:
    if not previous:
        return [*NAMES, "--help", "--version"]
    name, *arguments = previous
    if name == "help":
        keys = [key.removesuffix("=") for key in _keys(word, {})]
        return [*keys, *NAMES] if not arguments else []
    if name in LOOK_UP:
        return {"list": LISTS, "completion": tuple(SCRIPTS)}[name] if not arguments else []
    return _argument_candidates(name, arguments, word) if name in SUBCOMMANDS else []


def _argument_candidates(name: str, arguments: list[str], word: str) -> Iterable[str]:
    spec = read_specs()[name]
    options = {text: option for option in spec["options"] for text in option["names"]}
    if "command" in options:  # a command of `ssl-pretrain beton`
        commands = options["command"]["commands"]
        if not arguments:
            return list(commands)
        spec = commands[arguments[0]]
        options = {text: option for option in spec["options"] for text in option["names"]}
    if word.startswith("-"):
        return [text for text in options if text.startswith("-")] + ["--help"]
    previous = options.get(arguments[-1]) if arguments else None
    if arguments and arguments[-1].startswith("-") and previous and previous["nargs"] != 0:
        return previous["choices"] or []
    positionals = [text for text in arguments if not text.startswith("-")]
    if "config" in options and not positionals:
        return [*presets.list_files(), *_yaml_paths(word)]
    if "overrides" in options and positionals:
        if "config" in options:
            return _keys(word, _read_tree(positionals))
        return [key for key in _keys(word, {}) if key.startswith(EVALUATION_KEYS)]
    return []


def _yaml_paths(word: str) -> list[str]:
    paths = Path().glob(f"{word}*") if word and not word.startswith("/") else []
    return [f"{path}/" if path.is_dir() else str(path) for path in paths if _may_lead_to_yaml(path)]


def _may_lead_to_yaml(path: Path) -> bool:
    return path.is_dir() or path.suffix in (".yaml", ".yml")


def _read_tree(positionals: list[str]) -> dict[str, Any]:
    """Return the tree of the configuration, with the method that an override names."""
    tree = config_file.read_yaml(Path(positionals[0]))
    pairs = [(key, text) for key, _, text in (word.partition("=") for word in positionals[1:])]
    return method_name.override_method(tree, pairs, key_reference.declarations().run)


def _keys(word: str, tree: Mapping[str, Any]) -> list[str]:
    """Return the keys that continue a word by one name, or the values of a finished key."""
    entries = _expand_names(key_reference.keys(), tree) | _method_entries(tree)
    key, separator, _ = word.partition("=")
    if separator:
        entry = entries.get(key, {})
        values = ["true", "false"] if entry.get("type") == "bool" else entry.get("choices", [])
        values = list(key_reference.methods()) if key == "method.name" else values
        return [f"{key}={value}" for value in values]
    prefix = key[: key.rfind(".") + 1]
    names = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
    return [
        f"{name}." if entry["type"] in (SECTION, SECTIONS) else f"{name}="
        for name, entry in names.items()
        if "." not in name.removeprefix(prefix)
    ]


def _expand_names(entries: Entries, tree: Mapping[str, Any]) -> Entries:
    """Replace `views.crops.<name>` by the crops of the configuration."""
    crops = list(value_at(tree, "views.crops") or ["global", "local"])
    expanded = {key: entry for key, entry in entries.items() if NAME not in key}
    for crop in crops:
        expanded[f"views.crops.{crop}"] = {"type": SECTION}
        expanded |= {k.replace(NAME, crop): entry for k, entry in entries.items() if NAME in k}
    return expanded


def _method_entries(tree: Mapping[str, Any]) -> Entries:
    """Return the keys of the configuration's method, or of every method if it is not known."""
    name = method_name.read_name(tree)
    methods = key_reference.methods()
    if name in methods:
        return {f"method.{key}": entry for key, entry in methods[name]["keys"].items()}
    if name:
        return {}
    return {f"method.{method}": {"type": SECTION} for method in methods} | {
        f"method.{method}.{key}": entry
        for method, value in methods.items()
        for key, entry in value["keys"].items()
    }
