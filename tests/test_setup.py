"""Setup with make and docker/setup.sh, with stand-ins for the programs that it calls.

Nothing is downloaded or installed.
"""

import itertools
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "awk bash cat chmod cp df dirname env make mkdir rm sed sh tail touch tr"
LIBRARIES = "python3-dev pkg-config libopencv-dev libturbojpeg0-dev"

LOG = 'echo "${0##*/} $*" >> "$LOG"\n'
PYTHON = """case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$BIN/uv" .venv/bin/uv ;;
    "-m pip --version") [ "${0##*/}" = python ] ;;
    *sysconfig*) echo /usr/include ;;
esac
"""


class Machine:
    """A checkout and a PATH with few programs. Stand-ins write each call to a log."""

    def __init__(self, folder: Path):
        self.tree, self.bin, self.log = folder / "tree", folder / "bin", folder / "log"
        self.tree.mkdir()
        self.bin.mkdir()
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.tree)
        shutil.copytree(ROOT / "docker", self.tree / "docker")
        self.add_program("python3", LOG + PYTHON)
        self.add_program("uv", LOG)
        self.add_program("id", "echo 1000\n")

    def add_program(self, name: str, script: str) -> None:
        (self.bin / name).write_text("#!/usr/bin/env bash\n" + script)
        (self.bin / name).chmod(0o755)

    def add_libraries(self) -> None:
        self.add_program("pkg-config", "exit 0\n")
        self.add_program("c++", "exit 0\n")

    def make(self, *arguments: str, user: int | None = None) -> subprocess.CompletedProcess:
        self.log.write_text("")
        self.log.chmod(0o666)
        folders = {"PATH": str(self.bin), "BIN": str(self.bin), "LOG": str(self.log)}
        options = {"cwd": self.tree, "env": folders | {"LC_ALL": "C"}, "user": user}
        return subprocess.run(["make", *arguments], **options, capture_output=True, text=True)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def make_newer(self, name: str) -> None:
        newer_time = (self.tree / ".venv/.package").stat().st_mtime + 10
        os.utime(self.tree / name, (newer_time, newer_time))


@pytest.fixture
def machine():
    with tempfile.TemporaryDirectory() as folder:  # other users can enter it, unlike tmp_path
        os.chmod(folder, 0o755)
        yield Machine(Path(folder))


def test_the_first_run_prints_the_size_and_the_second_does_nothing(machine):
    first = machine.make("env")
    assert first.returncode == 0, first.stderr
    pattern = (
        r"Setting up \.venv .* GB to download, .* GB installed, .* minutes at 100 Mbit/s\. "
        r"Free here: \d+ GB\.\n"
    )
    assert re.fullmatch(pattern, first.stdout)
    installs = [call for call in machine.calls() if call.startswith("uv pip install")]
    pinned_installs = [call for call in installs if "docker/requirements.txt" in call]
    assert any("--require-hashes" in call for call in pinned_installs)
    assert not any("ffcv" in call for call in installs)
    second = machine.make("env")
    assert (second.returncode, second.stdout, second.stderr, machine.calls()) == (0, "", "", [])


@pytest.mark.parametrize(
    ("name", "expected", "unexpected"),
    [
        ("pyproject.toml", "--editable .", "requirements"),
        ("docker/requirements.txt", "-r docker/requirements.txt", "-m venv"),
    ],
)
def test_a_changed_file_repeats_only_its_step(machine, name, expected, unexpected):
    machine.make("env")
    machine.make_newer(name)
    assert machine.make("env").returncode == 0
    assert any(expected in call for call in machine.calls())
    assert not any(unexpected in call for call in machine.calls())


def test_ffcv_needs_libraries_that_only_root_can_install(machine):
    machine.add_program("apt-get", LOG)
    user = None
    if os.getuid() == 0:  # the stand-in for `id` alone does not take root's rights away
        user = 65534
        for path in (machine.tree, *machine.tree.rglob("*")):
            os.chown(path, user, -1)
    result = machine.make("ffcv", user=user)
    assert result.returncode != 0
    explanation, command = result.stderr.splitlines()[:2]
    assert explanation == (
        f"error: FFCV is not installed: its libraries are missing ({LIBRARIES}). To install them:"
    )
    assert command == f"    sudo apt-get update && sudo apt-get install -y {LIBRARIES} && make ffcv"
    assert not any(call.startswith("apt-get") for call in machine.calls())
    assert not any("requirements-ffcv" in call for call in machine.calls())
    machine.add_libraries()
    result = machine.make("ffcv", user=user)
    assert result.returncode == 0
    assert result.stdout.endswith("FFCV works. data.loader=ffcv uses its decoder.\n")


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        (
            "dnf",
            "sudo dnf install -y pkgconf-pkg-config python3-devel opencv-devel turbojpeg-devel "
            "&& make ffcv",
        ),
        ("brew", "brew install pkg-config opencv jpeg-turbo && make ffcv"),
        (
            None,
            "install pkg-config and the headers of Python, OpenCV and libturbojpeg, "
            "then: make ffcv",
        ),
    ],
)
def test_other_systems_are_told_their_own_command(machine, manager, command):
    machine.add_program("id", "echo 0\n")  # root, but no apt-get
    if manager:
        machine.add_program(manager, LOG)
    result = machine.make("ffcv")
    assert result.returncode != 0
    assert result.stderr.splitlines()[1] == f"    {command}"
    assert not any(call.startswith(str(manager)) for call in machine.calls())


def test_root_on_debian_installs_the_listed_packages_and_explains_them(machine):
    machine.add_program("id", "echo 0\n")
    add_libraries = "for name in pkg-config c++; do cp $BIN/uv $BIN/$name; done"
    machine.add_program("apt-get", f'{LOG}case "$1" in install) {add_libraries} ;; esac\n')
    result = machine.make("ffcv")
    assert result.returncode == 0
    explanation = "FFCV compiles against OpenCV (resizing) and libturbojpeg (JPEG decoding)."
    assert explanation in result.stdout
    assert result.stdout.endswith("FFCV works. data.loader=ffcv uses its decoder.\n")
    assert [call for call in machine.calls() if call.startswith("apt-get")] == [
        "apt-get update -qq",
        f"apt-get install -y -qq --no-install-recommends {LIBRARIES}",
    ]


def test_apt_without_a_network_is_reported(machine):
    machine.add_program("id", "echo 0\n")
    machine.add_program("apt-get", "echo 'E: Could not resolve the host' >&2; exit 100\n")
    result = machine.make("ffcv")
    assert result.returncode != 0
    assert "E: Could not resolve the host" in result.stderr
    assert f"FFCV is not installed: apt-get could not install {LIBRARIES}." in result.stderr


def test_a_failed_build_of_ffcv_prints_its_error(machine):
    machine.add_libraries()
    failure = 'echo "libffcv.cpp:1: error: no such thing"; exit 1'
    machine.make("env")
    script = f'{LOG}case "$*" in *requirements-ffcv*) {failure} ;; esac\n'
    machine.add_program("uv", script)
    shutil.copy(machine.bin / "uv", machine.tree / ".venv/bin/uv")
    result = machine.make("ffcv")
    assert result.returncode != 0
    assert "libffcv.cpp:1: error: no such thing\n" in result.stdout
    assert "error: FFCV did not build or import, see .venv/ffcv-build.log" in result.stderr


def test_an_old_python_is_refused_with_the_remedy(machine):
    machine.add_program(
        "python3", 'case "$1" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac\n'
    )
    result = machine.make("env")
    assert result.returncode != 0
    assert result.stderr.splitlines()[0] == (
        "error: Python 3.11 or newer is needed, python3 is Python 3.9.2. "
        "Install one, or name an installed one: make PYTHON=/path/to/python3.12"
    )
    assert not (machine.tree / ".venv").exists()


def test_a_newer_python_beside_an_old_one_is_found(machine):
    machine.add_program("python3", "exit 1\n")
    machine.add_program("python3.12", LOG + PYTHON)
    assert machine.make("env").returncode == 0
    assert "python3.12 -m venv .venv" in machine.calls()


def test_a_python_without_venv_is_refused_with_the_remedy(machine):
    machine.add_program("python3", 'case "$*" in *ensurepip*) exit 1 ;; esac\n')
    result = machine.make("env")
    assert result.returncode != 0
    message = "error: python3 has no venv module. On Debian or Ubuntu: apt-get install python3-venv"
    assert message in result.stderr


def test_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()
    command = ["make", "-C", str(ROOT), "help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [name for name in targets if not re.search(rf"^  make {name} +\S", text, re.M)] == []


def read_pins(name: str) -> dict[str, str]:
    """Return the entries of a requirements file by package.

    For a package that is pinned twice, for two ranges of Python, the last entry is returned.
    """
    text = (ROOT / "docker" / name).read_text()
    entries = re.finditer(r"^([A-Za-z0-9._-]+)==.*(?:\n    --hash=.*)*", text, re.M)
    return {entry[1].lower(): entry[0] for entry in entries}


@pytest.mark.parametrize(
    "name",
    ["requirements.txt", "requirements-ffcv.txt", "requirements-uv.txt", "requirements-lowest.txt"],
)
def test_every_requirement_is_exact_and_hashed(name):
    entries = read_pins(name)
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries.values())
    for line in (ROOT / "docker" / name).read_text().splitlines():
        assert "==" in line or line.startswith("    --hash=sha256:")


def test_the_pins_cover_pyproject_and_pin_nothing_twice():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def package_names(requirements):
        return {re.match(r"[A-Za-z0-9._-]+", line)[0].lower() for line in requirements}

    extras.pop("all")  # names other extras
    for_ffcv = package_names(extras.pop("ffcv"))
    others = package_names([*project["dependencies"], *itertools.chain(*extras.values())])
    pinned, pinned_for_ffcv = (
        set(read_pins("requirements.txt")),
        set(read_pins("requirements-ffcv.txt")),
    )
    assert others - pinned == set()
    assert for_ffcv - pinned_for_ffcv == set()
    assert pinned_for_ffcv & pinned == set()


def test_the_extra_all_holds_what_users_need_and_nothing_that_compiles():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    (entry,) = project["optional-dependencies"]["all"]
    names = re.fullmatch(r"ssl_pretrain\[(.*)\]", entry)[1].split(",")
    assert extras - set(names) == {"all", "bench", "dev", "docs", "ffcv"}


def test_the_lowest_pins_are_the_lowest_that_pyproject_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested_extras = (extras[name] for name in ("wandb", "slurm", "tensorboard", "data", "tiff"))
    declared = {}
    for requirement in itertools.chain(project["dependencies"], *tested_extras):
        if ">=" in requirement:
            name, version = re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement).groups()
            declared[name.lower()] = version
    assert (declared["torch"], declared["torchvision"]) == ("2.11", "0.26")
    entries = read_pins("requirements-lowest.txt")
    for name, version in declared.items():
        pinned = re.search(r"==([0-9.]+)", entries[name])[1]
        assert version_numbers(pinned) == version_numbers(version), name


def version_numbers(version: str) -> list[int]:
    """Return the four numbers of a version. Missing ones are zero."""
    numbers = [int(number) for number in version.split(".")]
    return numbers + [0] * (4 - len(numbers))


def test_without_python_3_12_the_tests_of_the_lowest_versions_name_the_remedy(machine):
    machine.add_libraries()
    machine.make("env")
    result = machine.make("test-lowest", "PYTHON_LOWEST=python3.10")
    assert result.returncode != 0
    assert result.stderr.startswith(
        "error: The lowest versions are tested on Python 3.12, and python3.10 is not it. "
        "Install it with one of: apt-get install python3.12; pyenv install 3.12; "
        ".venv/bin/uv python install 3.12. "
        "Or name an installed one: make test-lowest PYTHON_LOWEST=/path/to/python3.12\n"
    )
    assert machine.calls() == []


def test_the_lowest_versions_have_an_environment_of_their_own(machine):
    machine.add_libraries()
    machine.add_program("python3.12", LOG)
    creation = 'mkdir -p .venv-lowest/bin && cp "$BIN/python3.12" .venv-lowest/bin/python'
    machine.add_program("uv", f'{LOG}case "$1" in venv) {creation} ;; esac\n')
    machine.make("env")
    assert machine.make("test-lowest").returncode == 0
    text = "\n".join(machine.calls())
    assert re.search(r"^uv venv.*--python python3\.12 \.venv-lowest$", text, re.M)
    assert re.search(r"--require-hashes.*-r docker/requirements-lowest\.txt$", text, re.M)
    assert re.search(r"pytest.*promise|promise.*pytest", text)
