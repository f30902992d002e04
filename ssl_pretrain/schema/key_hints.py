"""Suggest the key that a user meant, for the message about a key that does not exist."""

from collections.abc import Sequence
from difflib import get_close_matches

from ssl_pretrain.schema import packaged_reference
from ssl_pretrain.system import program

MAX_LISTED = 8  # a section with more keys is not listed in the message
MAX_SUGGESTIONS = 3
KEYS_BY_FOREIGN_NAME = {  # names that other libraries use for the same setting
    "arch": "backbone.name",
    "architecture": "backbone.name",
    "encoder": "backbone.name",
    "model": "backbone.name",
    "model_name": "backbone.name",
    "network": "backbone.name",
    "pretrained": "backbone.init",
    "weights": "backbone.init",
    "checkpoint_path": "backbone.init",
    "ckpt": "backbone.init",
    "bs": "global_batch_size",
    "batch": "global_batch_size",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataset_path": "data.root",
    "dir": "data.root",
    "folder": "data.root",
    "path": "data.root",
    "dataset": "data.source",
    "train_dir": "data.train",
    "val_dir": "data.val",
    "valid": "data.val",
    "workers": "data.num_workers",
    "n_workers": "data.num_workers",
    "nworkers": "data.num_workers",
    "learning_rate": "optim.base_lr",
    "lr": "optim.base_lr",
    "max_lr": "optim.base_lr",
    "peak_lr": "optim.base_lr",
    "lr_scheduler": "optim.schedule",
    "lr_schedule": "optim.schedule",
    "scheduler": "optim.schedule",
    "sched": "optim.schedule",
    "min_lr": "optim.final_lr_ratio",
    "final_lr": "optim.final_lr_ratio",
    "opt": "optim.name",
    "optimiser": "optim.name",
    "optimizer": "optim.name",
    "clip_grad": "optim.clip_norm",
    "gradient_clip_val": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "warmup": "optim.warmup_epochs",
    "wd": "optim.weight_decay",
    "amp": "parallel.precision",
    "dtype": "parallel.precision",
    "fp16": "parallel.precision",
    "bf16": "parallel.precision",
    "sync_bn": "parallel.bn_group_images",
    "accumulate_grad_batches": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gpus": "launch.ranks",
    "num_gpus": "launch.ranks",
    "ngpus": "launch.ranks",
    "devices": "launch.ranks",
    "num_nodes": "launch.nodes",
    "crop_size": "views.crops.<name>.size",
    "image_size": "views.crops.<name>.size",
    "img_size": "views.crops.<name>.size",
    "input_size": "views.crops.<name>.size",
    "resolution": "views.crops.<name>.size",
    "color_jitter": "views.crops.<name>.jitter",
    "num_crops": "views.crops.<name>.count",
    "num_views": "views.crops.<name>.count",
    "mask_ratio": "views.crops.<name>.mask.ratio",
    "log_interval": "log.every_steps",
    "log_every": "log.every_steps",
    "wandb_project": "log.project",
    "use_wandb": "log.wandb",
    "save_every": "checkpoint.every_epochs",
    "save_freq": "checkpoint.every_epochs",
    "algorithm": "method.name",
    "loss": "method.name",
    "temp": "method.temperature",
    "tau": "method.temperature",
    "t": "method.temperature",
    "out_dim": "method.projector_dims",
    "proj_dim": "method.projector_dims",
    "random_seed": "seed",
    "log_dir": "output",
    "out": "output",
    "out_dir": "output",
    "output_dir": "output",
    "outdir": "output",
    "run_dir": "output",
    "save_dir": "output",
    "exp_name": "output",
    "eval": "evaluation",
    "knn": "online",
    "wandb": "log.wandb",
}
ADVICE = {  # remedies for keys that do not exist and correspond to no other key
    "device": "A run uses the GPUs that it sees; CUDA_VISIBLE_DEVICES= hides them",
    "resume": "The same command with the same output resumes a run",
    "resume_from": "The same command with the same output resumes a run",
}
MAIN_KEYS = {  # key that is meant by a single value for a whole section, such as `optim=lars`
    "backbone": "backbone.name",
    "data": "data.root",
    "method": "method.name",
    "optim": "optim.name",
}


def describe_unknown_key(key: str, allowed: Sequence[str]) -> str:
    """Return the message about a key that does not exist, with the most likely remedy.

    Args:
        key: The dotted key.
        allowed: Names of the keys in its section.
    """
    section, _, name = key.rpartition(".")
    if name.lower() in ADVICE:
        return f"{key}: no such key. {ADVICE[name.lower()]}"
    suggestions = _suggest(section, name.strip().lower().replace("-", "_"), allowed)
    hint = f" Did you mean {' or '.join(map(repr, suggestions))}?" if suggestions else ""
    methods = packaged_reference.read()["methods"] if section == "method" else {}
    owners = [method for method, description in methods.items() if name in description["keys"]]
    if owners:
        hint = f" It is one of {', '.join(owners)}."
    if len(allowed) <= MAX_LISTED:
        return f"{key}: no such key.{hint} Allowed: {', '.join(allowed)}"
    help_command = program.command(f"help {section}".rstrip())
    scope = " there" if section else ""
    return f"{key}: no such key.{hint} `{help_command}` lists the keys{scope}"


def describe_unknown_argument(key: str, allowed: Sequence[str]) -> str:
    """Return the message about a Python argument that is not a setting.

    Args:
        key: Name of the argument.
        allowed: Names of the keys and sections at the top.
    """
    if key.lower() in ADVICE:
        return f"{key}: no such setting. {ADVICE[key.lower()]}"
    suggestions = [name.replace(".", "__") for name in _suggest("", key.lower(), allowed)]
    hint = f" Did you mean {' or '.join(suggestions)}?" if suggestions else ""
    return f"{key}: no such setting.{hint} `{program.command('help')}` lists the keys"


def explain_option(name: str, value: str) -> str:
    """Explain how to write an option such as `--epochs 5` as a setting.

    Args:
        name: Name of the option, without dashes.
        value: The option's value, or an empty text.

    Returns:
        A sentence without its full stop, or an empty text if no setting resembles the option.
    """
    name = name.lower().replace("-", "_")
    if name in ADVICE:
        return ADVICE[name]
    if name in ("config", "cfg"):
        return "Give the preset or the YAML first, without an option"
    section, _, last_name = name.rpartition(".")
    keys = [name] if name in _all_keys() else _suggest(section, last_name, [])
    return f"Settings have no dashes: {keys[0]}={value or 'VALUE'}" if keys else ""


def refuse_misspelled_crop(key: str, names: Sequence[str]) -> None:
    """Refuse an override that would add a crop with nearly the name of an existing one.

    Args:
        key: Key of the override, of any section.
        names: Names of the recipe's crops.

    Raises:
        ValueError: If the key is `views.crops.NAME...` with such a name.
    """
    if not key.startswith("views.crops."):
        return
    name = key.removeprefix("views.crops.").partition(".")[0]
    close = get_close_matches(name, names, n=1, cutoff=0.8)
    # A second crop is usually named after the first one, with a number at the end.
    if close and name not in names and not name.startswith(close[0]):
        raise ValueError(
            f"views.crops.{name}: the recipe has no crop of this name. Did you mean {close[0]!r}?"
        )


def suggest_assignment(section: str, value: str) -> str:
    """Return how to set the main key of a section to a value, or an empty text if it has none."""
    return f"write {MAIN_KEYS[section]}={value}" if section in MAIN_KEYS else ""


def _suggest(section: str, name: str, allowed: Sequence[str]) -> list[str]:
    """Return the keys that a user may mean, at most `MAX_SUGGESTIONS`.

    A key in the same section is written without the section.

    Args:
        section: Section of the wrong key, or an empty text.
        name: The wrong key without its section.
        allowed: Names of the keys in the section.
    """
    foreign_key = KEYS_BY_FOREIGN_NAME.get(name)
    keys = [foreign_key] if foreign_key else keys_named(name)
    if not keys or len(keys) > MAX_SUGGESTIONS:
        keys = [_join(section, close) for close in get_close_matches(name, allowed, n=1)]
    if not keys and len(name) > 2:
        names = sorted({key.rpartition(".")[2] for key in _all_keys()})
        close_names = get_close_matches(name, names, n=1, cutoff=0.75)
        keys = [key for close in close_names for key in keys_named(close)]
    suggestions = []
    for key in keys[:MAX_SUGGESTIONS]:
        key_section, _, key_name = key.rpartition(".")
        is_of_other_method = section == key_section == "method" and key_name not in allowed
        if not is_of_other_method:
            suggestions.append(key_name if key_section == section else key)
    return suggestions


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def keys_named(name: str) -> list[str]:
    """Return the dotted keys of this name in all sections."""
    return [key for key in _all_keys() if key.rpartition(".")[2] == name]


def _all_keys() -> list[str]:
    """Return the dotted keys of all sections and methods."""
    reference = packaged_reference.read()
    method_keys = [
        f"method.{name}" for method in reference["methods"].values() for name in method["keys"]
    ]
    return list(dict.fromkeys([*method_keys, *reference["keys"]]))
