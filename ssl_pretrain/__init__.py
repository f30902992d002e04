"""Self-supervised pretraining of image backbones in plain torch.distributed.

    import ssl_pretrain

    run = ssl_pretrain.pretrain("photos/", output="runs/photos")
    backbone, transform = ssl_pretrain.load_backbone(run)

`import ssl_pretrain` imports no other package. Each function is loaded when it is first used.
"""

import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from ssl_pretrain.api import Run, embed, list_methods, load_backbone, pretrain

__all__ = ["Run", "__version__", "embed", "list_methods", "load_backbone", "pretrain"]
__version__ = "0.1.0"

# A checkout without symbolic links has eval/, launch/ and configs/ only at the top of the
# repository, so that folder is searched, too.
_repository = _Path(__file__).resolve().parent.parent
if not _Path(__file__).with_name("eval").is_dir() and (_repository / "pyproject.toml").is_file():
    __path__.append(str(_repository))

# sys.argv[0] is "-m" while Python locates the module of `python -m`, as for a command of this
# package. The command then imports torch for seconds, in which Ctrl-C should print no traceback.
if _sys.argv[:1] == ["-m"]:
    from ssl_pretrain.system import interruption as _interruption

    _interruption.report_in_one_line()


def __getattr__(name: str) -> _Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ssl_pretrain import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
