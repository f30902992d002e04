"""The set-up by make and docker/setup.sh, with stand-ins for the programs it calls: nothing is downloaded or installed."""

import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = [
    "awk",
    "bash",
    "cat",
    "chmod",
    "cp",
    "df",
    "dirname",
    "env",
    "make",
    "mkdir",
    "rm",
    "sed",
    "sh",
    "tail",
    "touch",
    "tr",
]
LIBRARIES = "python3-dev pkg-config libopencv-dev libturbojpeg0-dev"

LOG = 'echo "${0##*/} $*" >> "$LOG"\n'
PYTHON = """case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$BIN/uv" .venv/bin/uv ;;
    "-m pip --version") [ "${0##*/}" = python ] ;;
    *sysconfig*) echo /usr/include ;;
esac
"""


class Machine:
    """A checkout, and a PATH with the few programs that a machine has; each stand-in notes that it was called."""

    def __init__(self, folder: Path):
        self.tree, self.bin, self.log = folder / "tree", folder / "bin", folder / "log"
        self.tree.mkdir()
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.tree)
        shutil.copytree(ROOT / "docker", self.tree / "docker")
        self.has("python3", LOG + PYTHON)
        self.has("uv", LOG)
        self.has("id", "echo 1000\n")

    def has(self, name: str, script: str) -> None:
        (self.bin / name).write_text("#!/usr/bin/env bash\n" + script)
        (self.bin / name).chmod(0o755)

    def has_libraries(self) -> None:
        self.has("pkg-config", "exit 0\n")
        self.has("c++", "exit 0\n")

    def make(self, *arguments: str, user: int | None = None) -> subprocess.CompletedProcess:
        self.log.write_text("")
        self.log.chmod(0o666)
        environment = {
            "PATH": str(self.bin),
            "LOG": str(self.log),
            "BIN": str(self.bin),
            "LC_ALL": "C",
        }
        return subprocess.run(
            ["make", *arguments],
            cwd=self.tree,
            env=environment,
            user=user,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def newer(self, name: str) -> None:
        later = (self.tree / ".venv/.ffcv").stat().st_mtime + 10
        os.utime(self.tree / name, (later, later))


@pytest.fixture
def machine():
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # not tmp_path: another user has to be able to enter it
        os.chmod(folder, 0o755)
        yield Machine(Path(folder))


def test_the_first_run_says_the_size_and_the_second_does_nothing(machine):
    machine.has_libraries()
    first = machine.make("env")
    assert first.returncode == 0, first.stderr
    assert re.match(
        r"Setting up \.venv .* GB to download, .* GB installed, .* minutes at 100 Mbit/s\. Free here: \d+ GB\.\n",
        first.stdout,
    )
    assert first.stdout.endswith("FFCV works.\n")
    assert any(
        call.startswith("uv pip install")
        and "--require-hashes" in call
        and "docker/requirements.txt" in call
        for call in machine.calls()
    )
    second = machine.make("env")
    assert (second.returncode, second.stdout, second.stderr, machine.calls()) == (0, "", "", [])


@pytest.mark.parametrize(
    ("name", "called", "not_called"),
    [
        ("pyproject.toml", "--editable .", "requirements"),
        ("docker/requirements-ffcv.txt", "requirements-ffcv.txt", "--editable"),
        ("docker/requirements.txt", "-r docker/requirements.txt", "-m venv"),
    ],
)
def test_a_changed_file_repeats_only_its_step(machine, name, called, not_called):
    machine.has_libraries()
    machine.make("env")
    machine.newer(name)
    assert machine.make("env").returncode == 0
    assert any(called in call for call in machine.calls())
    assert not any(not_called in call for call in machine.calls())


def test_without_root_one_line_is_printed_and_the_set_up_goes_on(machine):
    machine.has("apt-get", LOG)
    user = None
    if os.getuid() == 0:  # another user in truth, not only by the stand-in
        user = 65534
        for path in (machine.tree, *machine.tree.rglob("*")):
            os.chown(path, user, -1)
    result = machine.make("env", user=user)
    assert (result.returncode, result.stderr) == (0, "")
    left_out, line, reminder = result.stdout.splitlines()[-3:]
    assert left_out == (
        f"FFCV, the fast image loader, is left out: its libraries are missing ({LIBRARIES})."
        " Images are read from folders. One line to have it:"
    )
    assert line == f"    sudo apt-get update && sudo apt-get install -y {LIBRARIES} && make ffcv"
    assert (
        reminder
        == "Without FFCV, images are read from folders; `make ffcv` says why and tries again."
    )
    assert not any(
        call.startswith("apt-get") or "requirements-ffcv" in call for call in machine.calls()
    )
    assert any("--editable ." in call for call in machine.calls())  # went on
    again = machine.make("env", user=user)
    assert (again.stdout.splitlines(), machine.calls()) == ([reminder], [])
    machine.has_libraries()
    assert machine.make("ffcv", user=user).stdout.endswith("FFCV works.\n")
    assert machine.make("env", user=user).stdout == ""


@pytest.mark.parametrize(
    ("manager", "line"),
    [
        (
            "dnf",
            "sudo dnf install -y pkgconf-pkg-config python3-devel opencv-devel turbojpeg-devel && make ffcv",
        ),
        ("brew", "brew install pkg-config opencv jpeg-turbo && make ffcv"),
        (
            None,
            "install pkg-config and the headers of Python, OpenCV and libturbojpeg, then: make ffcv",
        ),
    ],
)
def test_another_system_gets_its_own_line(machine, manager, line):
    machine.has("id", "echo 0\n")  # root, but no apt-get
    if manager:
        machine.has(manager, LOG)
    result = machine.make("env")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-2] == f"    {line}"
    assert not any(call.startswith(str(manager)) for call in machine.calls())


def test_root_on_debian_installs_the_listed_packages_and_says_why(machine):
    machine.has("id", "echo 0\n")
    machine.has(
        "apt-get",
        LOG
        + f'case "$1" in install) for name in pkg-config c++; do cp {machine.bin}/uv {machine.bin}/$name; done ;; esac\n',
    )
    result = machine.make("env")
    assert result.returncode == 0
    assert (
        "FFCV, the fast image loader, compiles against OpenCV (resizing) and libturbojpeg (JPEG decoding)."
        in result.stdout
    )
    assert result.stdout.endswith("FFCV works.\n")
    assert [call for call in machine.calls() if call.startswith("apt-get")] == [
        "apt-get update -qq",
        f"apt-get install -y -qq --no-install-recommends {LIBRARIES}",
    ]


def test_apt_without_a_network_is_a_message(machine):
    machine.has("id", "echo 0\n")
    machine.has("apt-get", "echo 'E: Could not resolve the host' >&2; exit 100\n")
    result = machine.make("env")
    assert result.returncode == 0
    assert "E: Could not resolve the host" in result.stderr
    assert f"is left out: apt-get did not bring {LIBRARIES}." in result.stdout


def test_a_failed_build_says_why_and_the_set_up_goes_on(machine):
    machine.has_libraries()
    machine.has(
        "uv",
        LOG
        + 'case "$*" in *requirements-ffcv*) echo "libffcv.cpp:1: error: no such thing"; exit 1 ;; esac\n',
    )
    result = machine.make("env")
    assert result.returncode == 0
    assert "libffcv.cpp:1: error: no such thing\n" in result.stdout
    assert "is left out: it did not build or import, see .venv/ffcv-build.log." in result.stdout
    machine.make("env")
    assert machine.calls() == []  # not built again at every make
    machine.make("ffcv")
    assert any("requirements-ffcv" in call for call in machine.calls())


def test_an_old_python_is_refused_with_the_remedy(machine):
    machine.has("python3", 'case "$1" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac\n')
    result = machine.make("env")
    assert result.returncode != 0
    assert result.stderr.splitlines()[0] == (
        "error: Python 3.11 or newer is needed, python3 is Python 3.9.2. "
        "Install one, or name one that is here: make PYTHON=/path/to/python3.12"
    )
    assert not (machine.tree / ".venv").exists()


def test_a_newer_python_beside_an_old_one_is_found(machine):
    machine.has_libraries()
    machine.has("python3", "exit 1\n")
    machine.has("python3.12", LOG + PYTHON)
    assert machine.make("env").returncode == 0
    assert "python3.12 -m venv .venv" in machine.calls()


def test_a_python_without_venv_is_refused_with_the_remedy(machine):
    machine.has("python3", 'case "$*" in *ensurepip*) exit 1 ;; esac\n')
    result = machine.make("env")
    assert result.returncode != 0
    assert (
        "error: python3 has no venv module. On Debian or Ubuntu: apt-get install python3-venv"
        in result.stderr
    )


def test_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()
    printed = subprocess.run(
        ["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True
    ).stdout
    assert [
        target for target in targets if not re.search(rf"^  make {target} +\S", printed, re.M)
    ] == []


def pins(name: str) -> dict[str, str]:
    """{package: its whole entry}; a package pinned twice, for two ranges of Python, keeps the last."""
    text = (ROOT / "docker" / name).read_text()
    return {
        match[1].lower(): match[0]
        for match in re.finditer(r"^([A-Za-z0-9._-]+)==.*(?:\n    --hash=.*)*", text, re.M)
    }


@pytest.mark.parametrize(
    "name",
    ["requirements.txt", "requirements-ffcv.txt", "requirements-uv.txt", "requirements-lowest.txt"],
)
def test_every_requirement_is_exact_and_hashed(name):
    entries = pins(name)
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries.values())
    others = [
        line
        for line in (ROOT / "docker" / name).read_text().splitlines()
        if "==" not in line and not line.startswith("    --hash=sha256:")
    ]
    assert others == []


def test_the_pins_cover_pyproject_and_name_nothing_twice():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(requirements):
        return {
            re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in requirements
        }

    everything = names(
        [
            *project["dependencies"],
            *(line for extra in extras if extra != "ffcv" for line in extras[extra]),
        ]
    )
    assert everything - set(pins("requirements.txt")) == set()
    assert names(extras["ffcv"]) - set(pins("requirements-ffcv.txt")) == set()
    assert set(pins("requirements-ffcv.txt")) & set(pins("requirements.txt")) == set()


def test_the_lowest_pins_are_the_lowest_that_pyproject_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        name: re.search(r"==([0-9.]+)", entry)[1]
        for name, entry in pins("requirements-lowest.txt").items()
    }
    parts = [
        re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement)
        for requirement in project["dependencies"]
        if ">=" in requirement
    ]
    declared = {name.lower(): version for name, version in (part.groups() for part in parts)}

    def number(version):
        numbers = [int(part) for part in version.split(".")]
        return numbers + [0] * (4 - len(numbers))

    assert (declared["torch"], declared["torchvision"]) == ("2.11", "0.26")
    assert {name: number(pinned[name]) for name in declared} == {
        name: number(version) for name, version in declared.items()
    }


def test_without_python_3_12_the_lowest_versions_say_how_to_get_it(machine):
    machine.has_libraries()
    machine.make("env")
    result = machine.make("test-lowest", "PYTHON_LOWEST=python3.10")
    assert result.returncode != 0
    assert result.stderr.startswith(
        "error: The lowest versions are tested on Python 3.12, and python3.10 is not it. Install it with one of: "
        "apt-get install python3.12; pyenv install 3.12; .venv/bin/uv python install 3.12. "
        "Or name one that is here: make test-lowest PYTHON_LOWEST=/path/to/python3.12\n"
    )
    assert machine.calls() == []


def test_the_lowest_versions_have_an_environment_of_their_own(machine):
    machine.has_libraries()
    machine.has("python3.12", LOG)
    machine.has(
        "uv",
        LOG
        + 'case "$1" in venv) mkdir -p .venv-lowest/bin && cp "$BIN/python3.12" .venv-lowest/bin/python ;; esac\n',
    )
    machine.make("env")
    assert machine.make("test-lowest").returncode == 0
    calls = machine.calls()
    assert any(
        call.startswith("uv venv") and call.endswith("--python python3.12 .venv-lowest")
        for call in calls
    )
    assert any(
        "--require-hashes" in call and call.endswith("-r docker/requirements-lowest.txt")
        for call in calls
    )
    assert any("pytest" in call and "promise" in call for call in calls)
