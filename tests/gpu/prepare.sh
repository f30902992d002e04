# Source this file in the root of the repository before tests/gpu/run.py, on a GPU machine without
# network access. It installs the wheels that `make gpu-kit` packed, unpacks CIFAR-10 beside them, and keeps
# every cache inside the folder .gpu-kit.
set -o pipefail
kit=$PWD/.gpu-kit
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$kit/site TRITON_CACHE_DIR=$kit/triton TORCHINDUCTOR_CACHE_DIR=$kit/inductor CIFAR10=$kit/cifar10
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$kit/site" "$kit"/wheels/*.whl
[ -d "$CIFAR10/train" ] || python3 -c "import tarfile; tarfile.open('$kit/cifar10.tar.xz').extractall('$CIFAR10', filter='data')"
python3 -c 'import numba, timm, omegaconf, safetensors, sklearn, lightly.loss'
