#!/usr/bin/env bash
# Install what the project needs. The Makefile and docker/Dockerfile call this script, from any folder, with
# one of these steps:
#   python    .venv with uv and everything in docker/requirements.txt, in exact versions checked by hash
#   package   this package itself, editable
#   ffcv      optional: the system libraries that FFCV needs, if they are missing, then FFCV, which is compiled
#   lowest    .venv-lowest with Python 3.12 and docker/requirements-lowest.txt, the lowest versions that
#             pyproject.toml declares, for `make test-lowest`
#   pin       write docker/requirements*.txt again from pyproject.toml. `pin --upgrade` takes newer versions
# Nothing outside the checkout changes, except uv's cache. Only the step ffcv, as root on Debian or Ubuntu,
# installs system packages.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv
uv=$venv/bin/uv

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Print the first Python that is new enough. If $PYTHON is set, only it is tried.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            say "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 | tail -n 1)." \
        "Install one, or name an installed one: make PYTHON=/path/to/python3.12"
}

step_python() {
    local python quiet=""
    [ -t 2 ] || quiet=--quiet     # show progress only on a terminal
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python has no venv module. On Debian or Ubuntu: apt-get install python3-venv; then run make again"
        say "Setting up $venv (first run on this checkout): on Linux x86_64 about 4.0 GB to download, 8.2 GB installed, most of it CUDA;" \
            "under a minute on a fast line, 6 minutes at 100 Mbit/s. Free here: $(df -Pk . | awk 'END { printf "%.0f GB", $4 / 1e6 }')."
        "$python" -m venv "$venv"
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r docker/requirements-uv.txt
    # The only source package is built with the pinned setuptools.
    "$uv" pip install $quiet --compile-bytecode --python "$venv/bin/python" --require-hashes --build-constraints docker/requirements.txt -r docker/requirements.txt
}

step_package() {
    "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation --editable .
}

system_packages() { sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' docker/system-packages.txt | tr '\n' ' ' | sed 's/ $//'; }

python_headers() { "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))'; }

# Succeed if FFCV's build will find what it looks for: both libraries by pkg-config, and their headers.
system_ready() {
    command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg || return 1
    # shellcheck disable=SC2046  # the flags are separate words
    printf '#include <Python.h>\n#include <opencv2/opencv.hpp>\n#include <turbojpeg.h>\n' |
        "${CXX:-c++}" -std=c++14 -I "$(python_headers)" $(pkg-config --cflags opencv4 libturbojpeg) -x c++ -E - >/dev/null 2>&1
}

# Print the command that installs the libraries on this system, for a user who may run it.
system_line() {
    if command -v apt-get >/dev/null; then say "sudo apt-get update && sudo apt-get install -y $(system_packages) && make ffcv"
    elif command -v dnf >/dev/null; then say "sudo dnf install -y pkgconf-pkg-config python3-devel opencv-devel turbojpeg-devel && make ffcv"
    elif command -v brew >/dev/null; then say "brew install pkg-config opencv jpeg-turbo && make ffcv"
    else say "install pkg-config and the headers of Python, OpenCV and libturbojpeg, then: make ffcv"
    fi
}

# Succeed if FFCV can be built. Otherwise print why not and the remedy.
step_system() {
    local reason
    system_ready && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "FFCV compiles against OpenCV (resizing) and libturbojpeg (JPEG decoding)." \
            "Installing $(system_packages) with apt-get, as root; at most 240 MB to download, 1 GB installed."
        # shellcheck disable=SC2046  # the packages are separate words
        if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(system_packages) >/dev/null; then
            system_ready && return
        fi
        reason="apt-get could not install $(system_packages)"
    else
        reason="its libraries are missing ($(system_packages))"
    fi
    fail "FFCV is not installed: $reason. To install them:"$'\n'"    $(system_line)"
}

step_ffcv() {
    local log=$venv/ffcv-build.log
    step_system
    say "Building FFCV (about 25 s) ..."
    if ! { "$uv" pip install --python "$venv/bin/python" --no-deps --no-build-isolation --require-hashes -r docker/requirements-ffcv.txt &&
        "$venv/bin/python" -c 'import ffcv'; } >"$log" 2>&1; then
        tail -n 15 "$log"
        fail "FFCV did not build or import, see $log"
    fi
    say "FFCV works. data.loader=ffcv uses its decoder."
}

# Print the first Python 3.12 on the path, of pyenv or of uv. If $PYTHON_LOWEST is set, only it is tried.
find_python_lowest() {
    local candidate
    for candidate in ${PYTHON_LOWEST:-python3.12 python3 "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.12.*/bin/python "${XDG_DATA_HOME:-${HOME:-}/.local/share}"/uv/python/cpython-3.12.*/bin/python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            say "$candidate"
            return
        fi
    done
    fail "The lowest versions are tested on Python 3.12, and ${PYTHON_LOWEST:-none of the installed Pythons} is not it." \
        "Install it with one of: apt-get install python3.12; pyenv install 3.12; $uv python install 3.12." \
        "Or name an installed one: make test-lowest PYTHON_LOWEST=/path/to/python3.12"
}

step_lowest() {
    local lowest=.venv-lowest python quiet=""
    [ -t 2 ] || quiet=--quiet
    if ! "$lowest/bin/python" --version >/dev/null 2>&1; then
        python=$(find_python_lowest)
        say "Setting up $lowest: on Linux x86_64 about 2.5 GB to download, 5.5 GB installed, if uv's cache is empty."
        "$uv" venv --quiet --clear --python "$python" "$lowest"
    fi
    "$uv" pip install $quiet --python "$lowest/bin/python" --require-hashes --build-constraints docker/requirements.txt -r docker/requirements-lowest.txt
    "$uv" pip install --quiet --python "$lowest/bin/python" --no-deps --no-build-isolation --editable .
}

step_pin() {
    local compile=("$uv" pip compile --quiet --universal --generate-hashes --no-header --no-annotate "$@") name skip=()
    local newest=("${compile[@]}" --python-version 3.11)
    "${newest[@]}" pyproject.toml --extra all --extra bench --extra docs --extra dev -o docker/requirements.txt >/dev/null
    while read -r name; do skip+=(--no-emit-package "$name"); done < <(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' docker/requirements.txt | sort -u)
    "${newest[@]}" - -c docker/requirements.txt "${skip[@]}" -o docker/requirements-ffcv.txt >/dev/null <<<"$(sed -n 's/^ffcv = \["\([^"]*\)".*/\1/p' pyproject.toml)"
    "${newest[@]}" - -o docker/requirements-uv.txt >/dev/null <<<"uv"
    "${compile[@]}" pyproject.toml --extra wandb --extra slurm --extra tensorboard --extra data --extra tiff --extra segmentation --extra text --extra dev --python-version 3.12 --resolution lowest-direct -o docker/requirements-lowest.txt >/dev/null
}

main() {
    case "${1:-}" in
        python | package | ffcv | lowest) "step_$1" ;;
        pin) shift; step_pin "$@" ;;
        *) fail "usage: docker/setup.sh python | package | ffcv | lowest | pin [--upgrade]" ;;
    esac
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
