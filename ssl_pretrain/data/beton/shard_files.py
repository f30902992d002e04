"""Names of .beton files: one per split, or a set of shards that is read as one."""

import re
from pathlib import Path

from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_names import split_of

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.beton")
_NAMES_SHOWN = 3


def shard_name(stem: str, number: int, count: int) -> str:
    """Return the file name of one shard, such as train-00000-of-00016.beton."""
    return f"{stem}-{number:05d}-of-{count:05d}.beton"


def all_shards(path: Path) -> list[Path]:
    """Return the file itself, or every shard of the set that it belongs to.

    Raises:
        ValueError: If shards are missing. The message names them.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    paths = [path.with_name(shard_name(match["stem"], number, count)) for number in range(count)]
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing:
        raise ValueError(
            f"data.root: {len(missing)} of {count} shards are missing beside {path}: "
            f"{abbreviate(missing, _NAMES_SHOWN)}; write them, or wait"
        )
    return paths


def find_beton(folder: Path, split: str) -> Path | None:
    """Return the .beton of a split in a folder, or the first of its shards.

    The file is named like the split, or by another usual spelling of it.
    """
    stems = sorted({path.name.split(".")[0].split("-0")[0] for path in folder.glob("*.beton")})
    same_split = [stem for stem in stems if split_of(split) and split_of(stem) == split_of(split)]
    for stem in (split, *same_split):
        if (folder / f"{stem}.beton").is_file():
            return folder / f"{stem}.beton"
        if shards := sorted(folder.glob(f"{stem}-?????-of-?????.beton")):
            return shards[0]
    return None
