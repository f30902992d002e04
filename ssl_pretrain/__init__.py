"""Self-supervised pretraining of image backbones in plain torch.distributed."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# A checkout without symbolic links has no eval/, launch/ and configs/ inside this package.
# They are found at the top of the repository instead.
_repository = _Path(__file__).resolve().parent.parent
if not _Path(__file__).with_name("eval").is_dir() and (_repository / "pyproject.toml").is_file():
    __path__.append(str(_repository))
