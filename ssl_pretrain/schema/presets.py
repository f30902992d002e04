"""Find the recipes that the package ships in `configs/` by their names."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from ssl_pretrain.system import program

PATTERNS = ("*.yaml", "sweeps/*.yaml")  # recipes, and studies of `ssl-pretrain sweep`
DATA_HINT = "give a preset first, and the images as data.root"
PRESET = re.compile(r"(?:configs/)?(?:sweeps/)?([^/\\]+?)(?:\.yaml)?")
_LABEL = re.compile(r"(Paper's number|Ours|Hardware|Hours|Recipe|Views|Data|Command|Number): *")


@dataclass(frozen=True)
class Header:
    """Contents of the comment at the top of a recipe."""

    title: str  # method, paper, data set and network
    numbers: str  # the paper's number and ours
    hardware: str


def folder() -> Path:
    """Return the folder of the recipes."""
    path = Path(str(resources.files("ssl_pretrain") / "configs"))
    # A checkout without symbolic links has the folder at the top of the repository.
    return path if path.is_dir() else Path(__file__).resolve().parents[2] / "configs"


def list_files() -> dict[str, Path]:
    """Return the file of each recipe and study, by name."""
    return {path.stem: path for pattern in PATTERNS for path in sorted(folder().glob(pattern))}


def find(path: str | Path) -> Path:
    """Return the file of a recipe. An existing file takes precedence over a preset's name.

    Raises:
        ValueError: If there is neither a file nor a preset of that name.
    """
    if Path(path).is_file():
        return Path(path)
    match = PRESET.fullmatch(str(path))
    files = list_files()
    if match and match[1] in files:
        return files[match[1]]
    if Path(path).is_dir():
        raise ValueError(f"{path}: a folder, not a preset or a YAML; {DATA_HINT}={path}")
    if "=" in str(path):
        raise ValueError(
            f"{path}: a setting, not a preset or a YAML; give one of these first, as in "
            f"simclr_cifar10 {path}"
        )
    neighbors = [str(file) for file in Path(path).parent.glob("*.yaml") if file.is_file()]
    names = {Path(name).stem: name for name in [*files, *neighbors]}
    nearest = get_close_matches(Path(path).stem, names, n=3, cutoff=0)
    raise ValueError(
        f"{path}: no such file or preset. The nearest are "
        f"{', '.join(names[name] for name in nearest)}; `{program.command('list configs')}` lists "
        "all presets"
    )


def read_header(path: Path) -> Header:
    """Read the comment at the top of a recipe."""
    texts, label = {"": ""}, ""  # the title has no label
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if match := _LABEL.match(text):
            label, text = match[1], text[match.end() :]
        texts[label] = f"{texts.get(label, '')} {text}".strip()
    numbers = texts.get("Paper's number", "")
    if "Ours" in texts:
        numbers = f"{numbers} Ours: {texts['Ours']}".strip()
    return Header(texts[""], numbers, texts.get("Hardware", ""))
