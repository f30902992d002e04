"""A terminal in memory that understands the control characters of the progress line."""

import io
import re

TOKEN = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]|[^\r\n\x1b]")


class Screen(io.StringIO):
    """Rows of a terminal, its scrollback included. Text in the last column wraps to the next row.

    Attributes:
        raw: Everything that was written.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width, self.raw = width, ""
        self._rows, self._row, self._column = [""], 0, 0

    def isatty(self):
        return True

    def write(self, text):
        self.raw += text
        for token in TOKEN.findall(text):
            self._apply(token)
        return len(text)

    def lines(self):
        return [row.rstrip() for row in self._rows]

    def _apply(self, token):
        if token == "\r":
            self._column = 0
        elif token == "\n":
            self._next_row()
        elif token == "\x1b[J":
            self._rows[self._row] = self._rows[self._row][: self._column]
            del self._rows[self._row + 1 :]
        elif not token.startswith("\x1b"):
            if self._column == self.width:
                self._next_row()
            row = self._rows[self._row].ljust(self._column)
            self._rows[self._row] = row[: self._column] + token + row[self._column + 1 :]
            self._column += 1

    def _next_row(self):
        self._row, self._column = self._row + 1, 0
        if self._row == len(self._rows):
            self._rows.append("")
