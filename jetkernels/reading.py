"""Folders that others save into while they are read: all files of one save. And text and JSON, checked."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from .files import INSTALLING, TRIES, finish

T = TypeVar("T")


class OpenFolder:
    """A folder opened once.

    Its files are opened relative to it, so that all are of one save, whatever is saved there meanwhile.
    """

    def __init__(self, path: Path, stack: ExitStack):
        self.path = path
        self.stack = stack
        self._files: dict[str, int] = {}
        self._folder = None
        if os.open in os.supports_dir_fd:
            self._folder = self._keep_open(os.open(path, os.O_RDONLY | os.O_DIRECTORY))

    def _keep_open(self, descriptor: int) -> int:
        self.stack.callback(os.close, descriptor)
        return descriptor

    def open(self, name: str) -> int:
        """The descriptor of a file, open until the folder is closed.

        Raises:
            OSError: it cannot be opened, or it is a folder, a device or a pipe.
        """
        if name not in self._files:
            # A pipe must not make the reader wait.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            try:
                where = name if self._folder is not None else self.path / name
                descriptor = self._keep_open(os.open(where, flags, dir_fd=self._folder))
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path / name)) from None
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise IsADirectoryError(
                    errno.EISDIR, "must be a file, it is a folder or a device", str(self.path / name)
                )
            self._files[name] = descriptor
        return self._files[name]

    def read(self, name: str) -> bytes:
        """The content of a file; raises as `open`."""
        with open(os.dup(self.open(name)), "rb") as file:
            file.seek(0)
            return file.read()

    def reopenable(self, name: str) -> str:
        """A path under which a library finds the very file that is open."""
        descriptor = self.open(name)
        for folder in ("/proc/self/fd", "/dev/fd"):
            if os.path.exists(f"{folder}/{descriptor}"):
                return f"{folder}/{descriptor}"
        return str(self.path / name)

    def is_current(self) -> bool:
        """Whether the folder and its files are those that were opened, and no writer is putting files in place."""

        def same(path: Path, descriptor: int) -> bool:
            now, then = os.stat(path), os.fstat(descriptor)
            return os.path.samestat(now, then) and (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)

        try:
            if self._folder is not None and not os.path.samestat(os.stat(self.path), os.fstat(self._folder)):
                return False
            return not os.path.lexists(self.path / INSTALLING) and all(
                same(self.path / name, fd) for name, fd in self._files.items()
            )
        except OSError:
            return False


@contextmanager
def reading(path: str | Path, load: Callable[[OpenFolder], T]) -> Iterator[T]:
    """Yields what `load` made of a folder; the files that it opened are all of one save and stay open during the block.

    `load` opens whatever will be needed. It is called again if the folder was replaced meanwhile.

    Raises:
        OSError: the folder cannot be opened, or it was replaced again and again.
        Exception: whatever `load` raises.
    """
    path = Path(path)
    for attempt in range(TRIES):
        with ExitStack() as stack:
            finish(path)
            folder = OpenFolder(path, stack)
            try:
                result = load(folder)
            except Exception:
                if folder.is_current():
                    raise
            else:
                if folder.is_current():
                    yield result
                    return
        # Saves that are much quicker than this reader do not keep it in step.
        time.sleep(0.001 * attempt)
    raise OSError(f"read: {path} was replaced {TRIES} times while it was being opened; read it when nobody saves there")


def utf8_text(raw: bytes, source: str) -> str:
    """Text in UTF-8; ValueError for other bytes, which names `source` and the first of them."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} must be UTF-8 text, got byte 0x{raw[error.start]:02x} at position {error.start:,}"
        ) from None


def lines_of(text: str) -> list[str]:
    """The lines of a file, without the LF or CR LF that ends them; U+2028 and the like end none."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def parse_json(content: bytes, where: object) -> dict:
    """A JSON object in UTF-8; `where` names it in errors.

    Raises:
        ValueError: it is anything else, is nested too deeply, or has a key twice.
    """

    def once(pairs: list[tuple[str, object]]) -> dict:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r:.100} twice")
        return values

    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(values).__name__}")
    return values
