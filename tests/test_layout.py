"""Layout of the repository: module names, the list of packages, no machine-specific text."""

import collections
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ssl_pretrain", "eval", "launch")
VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper", "stuff"}


def list_modules() -> list[Path]:
    """Return the paths of the package's Python files, each only once despite symbolic links."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted({path.resolve().relative_to(ROOT) for path in files})


def test_no_two_modules_share_a_basename():
    names = [path.stem for path in list_modules() if path.stem not in ("__init__", "__main__")]
    counts = collections.Counter(names)
    assert [name for name, count in counts.items() if count > 1] == []


def test_the_root_of_the_package_holds_at_most_ten_modules():
    assert len([path for path in list_modules() if path.parent == Path("ssl_pretrain")]) <= 10


def test_no_module_has_a_vague_name():
    assert not [str(path) for path in list_modules() if VAGUE_NAMES & {*path.with_suffix("").parts}]


def test_pyproject_lists_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    inits = [path.parent for path in list_modules() if path.name == "__init__.py"]
    folders = [".".join(path.parts) for path in [*inits, Path("configs"), Path("configs/sweeps")]]
    expected = [
        name if name.startswith("ssl_pretrain") else f"ssl_pretrain.{name}" for name in folders
    ]
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(expected)


# The patterns are split, so that this file passes its own check.
MACHINE_SPECIFIC = {
    "a package host": re.compile(
        r"https?://\S*(/simple|/packages/|\.whl|\.deb)|index-"
        + r"url|py"
        + r"pi\.org|python"
        + r"hosted"
    ),
    "a path of one machine": re.compile(r"(?<![\w.$}~])/" + r"(work|root|home/\w+|Users/\w+)/"),
    "the developers' data folder": re.compile(r"\bshared" + r"/"),
}


def find_machine_specific_lines(text: str) -> list[str]:
    """Return an entry `number: names what: line` for each line that is specific to one machine."""
    return [
        f"{number}: names {what}: {line.strip()[:120]}"
        for what, pattern in MACHINE_SPECIFIC.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_names_a_package_host_or_a_path_of_one_machine():
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    command = ["git", "-c", f"safe.directory={ROOT}", *listing]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout, so the tracked files are unknown")
    problems = []
    for name in filter(None, result.stdout.split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            lines = find_machine_specific_lines(content.decode(errors="replace"))
            problems += [f"{name}:{line}" for line in lines]
    assert not problems, "\n" + "\n".join(problems)


def test_the_scan_tells_machine_specific_lines_from_others():
    hosts = ["--extra-index-" + "url x", "http://host" + "/simple"]
    paths = ["see '/ro" + "ot/.cache'", "cd /wo" + "rk/main", "data.root=../sha" + "red/data/x.zip"]
    for line in [*hosts, *paths]:
        assert find_machine_specific_lines(f"first\n{line}\n")[0].startswith("2: names ")
    for line in ["data.root=/data/imagenet", "https://github.com/a/b/tree/work/x", "runs/work/x"]:
        assert not find_machine_specific_lines(line)
