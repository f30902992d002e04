"""The Weights & Biases mode of a run: online, offline or off."""

import configparser
import netrc
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
}
TRUE = ("1", "true", "t", "yes", "y", "on")


def resolve(setting: str) -> tuple[str, str]:
    """Return the mode of a run and a message for the user, which is usually empty.

    `auto` is online if there is a key, else off. `WANDB_MODE`, `WANDB_DISABLED` and W&B's own
    settings files (`wandb offline`) can only lower the mode. If they lower an explicit `online`
    or `offline`, the message says so.

    Args:
        setting: The value of `log.wandb`.
    """
    limit, source = _limit()
    if setting == "auto":
        if has_key():
            return limit or "online", ""
        hint = (
            f"W&B: off, because no API key was found. {source} requests offline mode; "
            "log.wandb=offline does that without a key"
        )
        return "off", hint if limit == "offline" else ""
    order = ["off", "offline", "online"]
    if limit and order.index(limit) < order.index(setting):
        return limit, f"W&B: {limit}, because {source} overrides log.wandb={setting}"
    return setting, ""


def has_key() -> bool:
    """Return True if the environment or the netrc file has a W&B key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def _limit() -> tuple[str, str]:
    """Return W&B's own mode and the setting that it comes from, or two empty strings.

    The environment takes precedence over the settings files.
    """
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in TRUE:
        return "off", f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}"
    if mode := os.environ.get("WANDB_MODE", "").strip():
        return MODES.get(mode.lower(), "off"), f"WANDB_MODE={mode}"
    folder = Path(os.environ.get("WANDB_DIR") or ".")
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb"))
    for path in (folder / ".wandb" / "settings", folder / "wandb" / "settings", home / "settings"):
        settings = configparser.ConfigParser(interpolation=None)
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            settings.read(path)
            if settings.get("default", "disabled", fallback="false").lower() == "true":
                return "off", f"disabled in {path}"
            if mode := settings.get("default", "mode", fallback=""):
                return MODES.get(mode.lower(), "off"), f"mode = {mode} in {path}"
    return "", ""
