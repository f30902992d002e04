"""Answer Ctrl-C in one line while a command starts, when nobody handles it yet."""

import sys
from types import TracebackType


def report_in_one_line() -> None:
    """Print one line instead of a traceback if a KeyboardInterrupt ends this process."""
    previous = sys.excepthook

    def report(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"\n{str(error) or 'stopped before the command was done'}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = report
