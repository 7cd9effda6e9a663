"""Files and folders that are seen whole or not at all.

That holds for a reader beside a writer, after a kill and after a power failure. A writer makes everything ready in a
workplace, a hidden folder with a lock that it holds while it lives, and then puts it in place: one rename for a file;
for a folder an exchange of the two (Linux `renameat2`). A mount point, a folder that holds one or whose parent may not
be written, and a system without exchange get the files one by one: the workplace, moved into the folder first, is the
record from which whoever comes next finishes what a dead writer began. A workplace that nobody locks is a dead
writer's; the next save beside it removes it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # not a Unix: no locks

PREFIX, SUFFIX = ".jetkernels-", ".saving"
WORKPLACE = re.compile(re.escape(PREFIX) + "[a-z0-9_]{8}" + re.escape(SUFFIX))
INSTALLING = PREFIX + "installing"  # a workplace whose files go into the folder that it lies in
LOCK, NEW, REMOVED = "lock", "new", "removed.json"
TRIES = 100
PATIENCE = 60.0  # seconds that another writer may take to put its files in place
# What an exchange answers where there is none: an old system, a file system without it, a mount point, another's folder
# in /tmp.
NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES}


def write_atomic(path: str | Path, content: bytes) -> None:
    """Gives `path` this content in one step: a reader, or a kill, sees the old file or the new one, never a part.

    Raises:
        IsADirectoryError: `path` is a folder.
        NotADirectoryError: `path` is below a file.
        OSError: as for `replacing`.
    """
    path = _real(path)
    if path.is_dir():
        raise IsADirectoryError(f"save: {path} is a folder, it must be a file")
    _clean(path.parent)
    for attempt in range(TRIES):
        _make_folder(path.parent)
        try:
            with _Workplace(path.parent) as place:
                temporary = place.path / NEW
                with _naming(place, path):
                    temporary.write_bytes(content)
                    _flush(temporary)
                with _alone(path.parent), _naming(place, path):
                    os.replace(temporary, path)
                _flush(path.parent)
            return
        except FileNotFoundError:
            # Another writer has exchanged the folder that the workplace was in.
            if attempt == TRIES - 1:
                raise


@contextmanager
def replacing(folder: str | Path, drop: Iterable[str] = ()) -> Iterator[Path]:
    """Yields an empty folder; what the block writes there gets into `folder` in one step if the block succeeds.

    Otherwise nothing does. The other files of `folder` stay, but for those whose names match a pattern of `drop`.
    New files get the permissions that the umask says; the folder keeps its own. Of two writers at once the later
    one wins, whole.

    Raises:
        NotADirectoryError: `folder` is a file, or below one.
        OSError: the disk is full, a permission is missing, `folder` is "".
    """
    folder = _real(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save: {folder} is not a folder")
    _clean(folder.parent)
    _clean(folder)
    with _Workplace(_place_of(folder)) as place, _naming(place, folder):
        new = place.path / NEW
        new.mkdir()
        yield new
        for root, _, names in os.walk(new):
            for name in names:
                # Some libraries make private files.
                os.chmod(os.path.join(root, name), place.file_mode)
                _flush(os.path.join(root, name))
            _flush(root)
        _put_in_place(place, folder, list(drop))


def _real(path: str | Path) -> Path:
    if not os.fspath(path):
        raise FileNotFoundError("save: the path must have a name, got ''")
    return Path(os.path.realpath(path))


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if there.is_dir():
            raise
        raise NotADirectoryError(f"save: {there} is not a folder") from None


@contextmanager
def _naming(place: _Workplace, target: Path) -> Iterator[None]:
    """Errors of the system name what was to be written, not a temporary file, or nothing."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        if error.errno is None or name and not name.startswith(str(place.path)):
            raise
        new = str(place.path / NEW)
        below = name.removeprefix(new) if name.startswith(new) else ""
        raise OSError(error.errno, error.strerror, str(target) + below) from None


def _place_of(folder: Path) -> Path:
    """Where a workplace for `folder` can be: beside it, or in it if an exchange is out of the question.

    Nobody wants to find himself in a folder that has been exchanged for another and deleted. A folder that may not be
    written cannot be exchanged; a workplace in it fails at once, before anything is written, with the system's reason.
    """
    _make_folder(folder.parent)
    if not folder.is_dir():
        return folder.parent
    is_here = folder in (here := Path.cwd().resolve(), *here.parents)
    return (
        folder
        if is_here or _is_mount(folder) or not (_writable(folder) and _writable(folder.parent))
        else folder.parent
    )


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _is_mount(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    try:  # a folder of the same disk, mounted a second time
        mounts = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False
    points = (line.split()[4] for line in mounts.splitlines())
    return os.fsencode(folder) in (re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), point) for point in points)


class _Workplace:
    """A new hidden folder in `parent`.

    Its lock is held until it is removed, so that others see whether its writer lives.

    Attributes:
        path: of the folder.
        file_mode: the permissions of a new file under this umask.
    """

    def __init__(self, parent: Path):
        for _ in range(TRIES):
            try:
                self.path = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=parent))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(parent)) from None
            if self._lock():
                return
        raise OSError(f"save: the temporary folders made in {parent} vanish")

    def _lock(self) -> bool:
        """Whether it is ours: between its making and its locking another writer may take it for a dead one's."""
        try:
            self.lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            return False
        status = os.fstat(self.lock)
        self.file_mode = stat.S_IMODE(status.st_mode)
        locked = _try_lock(self.lock)
        if locked is None:
            # No locks here. A workplace without one is never taken for a dead one's.
            os.unlink(self.path / LOCK)
            return True
        if locked and os.fstat(self.lock).st_nlink:
            return True
        os.close(self.lock)
        return False

    def __enter__(self) -> _Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self.path)
        os.close(self.lock)


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _clean(parent: Path) -> None:
    """Removes what dead writers left in a folder, as far as that is allowed."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if WORKPLACE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_dead(Path(entry.path))


def _remove_if_dead(path: Path) -> None:
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        # Its writer died before it had a lock, or when everything else was removed; or it is about to lock it, and
        # makes another.
        os.rmdir(path)
        return
    try:
        if _try_lock(lock) and os.fstat(lock).st_nlink:
            _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    """Removes a workplace, the lock last: a kill on the way leaves what is still seen to be a dead writer's."""
    with suppress(OSError):
        if (path / NEW).is_dir():
            shutil.rmtree(path / NEW, ignore_errors=True)
        if (path / NEW).is_dir() and hasattr(os, "fwalk"):
            # What a folder holds goes away only while the folder may be written.
            for *_, folder in os.fwalk(path / NEW):
                with suppress(OSError):
                    os.fchmod(folder, 0o700)
            shutil.rmtree(path / NEW, ignore_errors=True)
        for name in (NEW, REMOVED, LOCK):
            (path / name).unlink(missing_ok=True)
        path.rmdir()


def _flush(path: str | Path) -> None:
    """Waits until a file, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot do this for folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


# ---- putting a folder in place


def _put_in_place(place: _Workplace, folder: Path, drop: list[str]) -> None:
    new = place.path / NEW
    for _ in range(TRIES):
        try:
            if not folder.exists():
                os.rename(new, folder)
                _flush(folder.parent)
                return
            finish(folder)
            with _alone(folder):
                if not _exchanged(new, folder, drop):
                    _install(place, folder, drop)
            return
        except FileNotFoundError:
            if not new.is_dir():
                raise
        except OSError as error:
            # Another writer was faster: to make the folder, or to begin putting its files in place.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(f"save: {folder} was replaced {TRIES} times by others while it was to be replaced")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of the writers that put files in place one at a time works on a folder, so that none undoes another's."""
    while True:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                yield
                return
        finally:
            os.close(descriptor)


def _exchanged(new: Path, folder: Path, drop: list[str]) -> bool:
    """Exchanges the folders, the kept files linked into the new one before.

    Returns: False if that cannot be done here; nothing is changed.
    """
    if new.parent.parent != folder.parent:
        return False
    kept: list[Path] = []
    mode = stat.S_IMODE(os.stat(new).st_mode)
    try:
        _keep(folder, new, drop, kept)
        shutil.copystat(folder, new)
        status = os.stat(folder)
        with suppress(OSError):
            os.chown(new, status.st_uid, status.st_gid)
            os.chmod(new, stat.S_IMODE(status.st_mode))
        os.utime(new)
        for path in {new, *(path.parent for path in kept)}:
            _flush(path)
        _exchange(new, folder)
    except OSError as error:
        # By now they may have the modes of the folders that they were to replace.
        with suppress(OSError):
            os.chmod(new, mode)
            for path in kept:
                if path.is_dir() and not path.is_symlink():
                    os.chmod(path, 0o700)
        for path in reversed(kept):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        if error.errno in NO_EXCHANGE:
            return False
        raise
    _flush(folder.parent)
    return True


def _exchange(a: Path, b: Path) -> None:
    """Swaps two names in one step."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here, exchange = -100, ctypes.c_uint(2)
    if call(here, os.fsencode(a), here, os.fsencode(b), exchange):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))


def _keep(old: Path, new: Path, drop: list[str], kept: list[Path]) -> None:
    """Links to the files of `old` that `new` does not have, nor `drop` matches. Adds what it makes to `kept`."""
    for name in os.listdir(old):
        source, target = old / name, new / name
        if _is_ours(name) or any(fnmatch(name, pattern) for pattern in drop):
            continue
        is_folder = source.is_dir() and not source.is_symlink()
        if os.path.lexists(target) and not (is_folder and target.is_dir()):
            continue
        with suppress(FileNotFoundError):  # removed meanwhile by someone else
            if not is_folder:
                _link(source, target)
                kept.append(target)
                continue
            if _is_mount(source) or not (_writable(source) or source.stat().st_uid == os.geteuid()):
                # After the exchange the old one could not be removed, or what is mounted there would be.
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))
            is_new = not target.is_dir()
            if is_new:
                target.mkdir()
                kept.append(target)
            _keep(source, target, [], kept)
            if is_new:
                shutil.copystat(source, target)  # in the end: it may forbid to write


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not target.is_symlink():
            _flush(target)


def _is_ours(name: str) -> bool:
    return name == INSTALLING or WORKPLACE.fullmatch(name) is not None


def _install(place: _Workplace, folder: Path, drop: list[str]) -> None:
    """Puts the files in place one by one.

    From the first rename on, the save is the new one: who finds it unfinished finishes it.
    """
    new = place.path / NEW
    for root, _, names in os.walk(new):
        for name in names:
            target = folder / os.path.relpath(os.path.join(root, name), new)
            if target.is_dir():
                raise IsADirectoryError(f"save: {target} must be a file, it is a folder")
    removed = [name for name in os.listdir(folder) if any(fnmatch(name, p) for p in drop) and not (new / name).exists()]
    (place.path / REMOVED).write_text(json.dumps(removed))
    _flush(place.path / REMOVED)
    _flush(place.path)
    os.rename(place.path, folder / INSTALLING)
    place.path = folder / INSTALLING
    _flush(folder)
    _move(place.path, folder)


def _move(place: Path, folder: Path) -> None:
    """What a workplace in `folder` still holds goes into the folder, what it lists goes away."""
    for root, folders, names in os.walk(place / NEW):
        into = folder / os.path.relpath(root, place / NEW)
        for name in folders:
            (into / name).mkdir(exist_ok=True)
        for name in names:
            os.replace(os.path.join(root, name), into / name)
    for name in json.loads((place / REMOVED).read_text()):
        (folder / name).unlink(missing_ok=True)
    _flush(folder)


def finish(folder: Path) -> None:
    """Waits for a writer that is putting its files in place one by one; if it is dead, does the rest."""
    until = time.monotonic() + PATIENCE
    while os.path.lexists(folder / INSTALLING):
        # Gone meanwhile, or another user's: then only its owner can tell whether it lives.
        with suppress(FileNotFoundError, PermissionError):
            if _finished(folder):
                continue
        if time.monotonic() > until:
            raise OSError(
                f"{folder} is half written for {PATIENCE:.0f} s: if nobody saves there, its owner must save or load "
                "once more"
            )
        time.sleep(0.01)


def _finished(folder: Path) -> bool:
    """Does the rest of a dead writer's work; False if the writer lives."""
    place = folder / INSTALLING
    with ExitStack() as stack:
        opened = os.open(place, os.O_RDONLY)
        stack.callback(os.close, opened)
        try:
            lock = os.open(LOCK, os.O_RDWR, dir_fd=opened)
        except FileNotFoundError:
            # The lock is the last thing that goes away, so this one is either done or was made where there are no
            # locks.
            if REMOVED not in os.listdir(opened):
                try:
                    os.rmdir(place)
                except OSError as error:
                    # It is gone, and the next writer's has its name.
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                return True
        else:
            stack.callback(os.close, lock)
            if not _try_lock(lock) or not os.fstat(lock).st_nlink:
                return False
        # Without the list its writer had done everything, and died when it cleaned up.
        if REMOVED in os.listdir(opened):
            _move(place, folder)
        _remove(place)
        return True
