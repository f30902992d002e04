"""Complete a command line from the generated files. The scripts of the shells call this."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.command import name_lists
from ssl_pretrain.command.option_specs import read_specs
from ssl_pretrain.command.shell_scripts import SCRIPTS
from ssl_pretrain.command.subcommands import LOOK_UP, NAMES, SUBCOMMANDS
from ssl_pretrain.schema import config_file, key_reference, method_name, presets
from ssl_pretrain.schema.key_entries import NAME, SECTION, SECTIONS, Entries
from ssl_pretrain.schema.yaml_tree import value_at

HIDDEN_COMMAND = "__complete"
EVALUATION_KEYS = ("data.", "evaluation.")  # sections that an evaluation may override


def complete(words: list[str]) -> list[str]:
    """Return the words that complete the last word of an unfinished command line.

    Args:
        words: Words after `ssl-pretrain`. The last one may be empty.
    """
    *preceding, word = words or [""]
    with suppress(ValueError, OSError):  # an unfinished command line may be wrong
        return sorted(text for text in set(_candidates(preceding, word)) if text.startswith(word))
    return []


def _candidates(preceding: list[str], word: str) -> Iterable[str]:
    """Return the words that may follow. The caller keeps those that start with `word`."""
    if not preceding:
        return [*NAMES, "--help", "--version"]
    name, *arguments = preceding
    if name == "help":
        keys = [key.removesuffix("=") for key in _keys(word, {})]
        return [*keys, *NAMES] if not arguments else []
    if name in LOOK_UP:
        choices = {"list": list(name_lists.LISTS), "completion": list(SCRIPTS)}
        return choices[name] if not arguments else []
    return _argument_candidates(name, arguments, word) if name in SUBCOMMANDS else []


def _argument_candidates(name: str, arguments: list[str], word: str) -> Iterable[str]:
    """Return the options, choices, presets, files or keys that may follow the arguments."""
    options = _options_by_name(read_specs()[name])
    if "command" in options:  # a command of `ssl-pretrain beton`
        commands = options["command"]["commands"]
        if not arguments:
            return list(commands)
        options = _options_by_name(commands[arguments[0]])
    if word.startswith("-"):
        return [text for text in options if text.startswith("-")] + ["--help"]
    if arguments and arguments[-1].startswith("-"):
        option = options.get(arguments[-1])
        if option and option["nargs"] != 0:
            return option["choices"] or []
    positionals = [text for text in arguments if not text.startswith("-")]
    if "config" in options and not positionals:
        return [*presets.list_files(), *_yaml_paths(word)]
    if "overrides" in options and positionals:
        if "config" in options:
            return _keys(word, _read_tree(positionals))
        return [key for key in _keys(word, {}) if key.startswith(EVALUATION_KEYS)]
    return []


def _options_by_name(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {name: option for option in spec["options"] for name in option["names"]}


def _yaml_paths(word: str) -> list[str]:
    """Return the YAML files and the folders whose paths start with a word."""
    paths = Path().glob(f"{word}*") if word and not word.startswith("/") else []
    candidates = []
    for path in paths:
        if path.is_dir():
            candidates.append(f"{path}/")
        elif path.suffix in (".yaml", ".yml"):
            candidates.append(str(path))
    return candidates


def _read_tree(positionals: list[str]) -> dict[str, Any]:
    """Return the tree of the configuration, with the method that an override names."""
    tree = config_file.read_yaml(Path(positionals[0]))
    pairs = [(key, text) for key, _, text in (word.partition("=") for word in positionals[1:])]
    return method_name.override_method(tree, pairs, key_reference.declarations().run)


def _keys(word: str, tree: Mapping[str, Any]) -> list[str]:
    """Return the keys that extend a word by one name, or `KEY=VALUE` after an equals sign.

    Args:
        word: The word to complete.
        tree: Tree of the configuration, which names the method and the crops.
    """
    entries = _expand_names(key_reference.keys(), tree) | _method_entries(tree)
    key, separator, _ = word.partition("=")
    if separator:
        return [f"{key}={value}" for value in _values(key, entries.get(key, {}))]
    prefix = key[: key.rfind(".") + 1]
    names = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
    return [
        f"{name}." if entry["type"] in (SECTION, SECTIONS) else f"{name}="
        for name, entry in names.items()
        if "." not in name.removeprefix(prefix)
    ]


def _values(key: str, entry: Mapping[str, Any]) -> list[str]:
    """Return the allowed values of a key, or none if there are too many to list."""
    if key == "method.name":
        return list(key_reference.methods())
    return ["true", "false"] if entry.get("type") == "bool" else entry.get("choices", [])


def _expand_names(entries: Entries, tree: Mapping[str, Any]) -> Entries:
    """Replace `views.crops.<name>` by the crops of the configuration."""
    crops = list(value_at(tree, "views.crops") or ["global", "local"])
    expanded = {key: entry for key, entry in entries.items() if NAME not in key}
    for crop in crops:
        expanded[f"views.crops.{crop}"] = {"type": SECTION}
        expanded |= {
            key.replace(NAME, crop): entry for key, entry in entries.items() if NAME in key
        }
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
