"""A folder that appears under its name whole or not at all, whatever ends the process that writes it.

Files are written into a hidden neighbour, `.NAME.fastft-partial`, under a lock that the system drops when its process
ends; it is renamed when everything has gone well. What a killed run left there is emptied by the next one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastft.errors import FastftError, FolderExistsError, WriteError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BARRED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def new_folder(out: Path, what: str) -> Iterator[Path]:
    """with new_folder(out, "merge") as folder: write into `folder`; afterwards it is `out`.

    Args:
        out: the folder to be, which must not be there yet.
        what: the command, with which messages begin.
    Raises:
        FolderExistsError: `out` is there, or another process is writing it.
        WriteError: it cannot be written (a full disk, no permission).
    After any exception nothing is left of it."""
    if os.path.lexists(out):
        raise FolderExistsError(f"{what}: {str(out)!r} exists; give a new folder")
    out = out.absolute()
    partial = out.with_name(f".{out.name}.fastft-partial")
    made = [p for p in partial.parents if not p.exists()]
    lock = None
    try:
        lock = _claim(partial, out, what)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if os.path.lexists(out):
            raise FolderExistsError(f"{what}: {str(out)!r} appeared while it was being written; give a new folder")
        os.rename(partial, out)
    except BaseException as e:
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
        if isinstance(e, OSError) and not isinstance(e, FastftError):
            raise write_error(e, out, what) from e
        raise
    finally:
        if lock is not None:
            os.close(lock)


def write_error(e: OSError, out: Path, what: str) -> WriteError:
    """One line for what the system refused."""
    said = (e.strerror or str(e)).splitlines()[0] if (e.strerror or str(e)) else type(e).__name__
    if e.errno in FULL or (e.errno is None and said.endswith(" written")):  # numpy's text where a file is cut short
        return WriteError(f"{what}: no room for {str(out)!r} ({said}): free some, or give a folder on another disk")
    if e.errno in BARRED:
        return WriteError(f"{what}: cannot write {str(out)!r} ({said}): give a folder that you may write")
    at = f" {e.filename!r}" if e.filename else ""
    return WriteError(f"{what}: cannot write {str(out)!r} ({said}{at})")


def check_room(folder: Path, needed: int, what: str) -> None:
    """WriteError, before anything is written, where fewer than `needed` bytes are free on the disk of `folder`."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    disk = shutil.disk_usage(there)
    if disk.total > 0 and disk.free < needed:  # what has no size at all is no disk
        gib = lambda n: f"{n / 2**30:.2f} GiB"
        raise WriteError(
            f"{what}: no room for {str(folder)!r}: want {gib(needed)}, free are {gib(disk.free)}: free some, or give a "
            "folder on another disk"
        )


def _claim(partial: Path, out: Path, what: str) -> int:
    """The locked, empty folder's file descriptor."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        fd = os.open(partial, os.O_RDONLY)
        try:
            _lock(fd)
        except BlockingIOError:
            os.close(fd)
            raise FolderExistsError(
                f"{what}: another process is writing {str(out)!r}; wait for it, or give another folder"
            ) from None
        with suppress(FileNotFoundError):
            if os.stat(partial).st_ino == os.fstat(fd).st_ino:  # not renamed or removed since it was opened
                break
        os.close(fd)
    for path in partial.iterdir():  # a killed run's
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return fd


def _lock(fd: int) -> None:
    """BlockingIOError where another process holds it. A file system without locks has none."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return
