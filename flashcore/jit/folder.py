"""The cache folder: where it is, why it may be trusted, and how files in it are written.

A cache entry is code that this process will run, so a folder that another user can write to is
refused rather than used with care.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = "FLASHCORE_CACHE_DIR"
LOCK_TIMEOUT_S = 600.0  # a compilation takes seconds; ten minutes means its holder hangs
_POLL_S = 0.05
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class UnsafeCacheError(PermissionError):
    """The cache folder could be written by another user, or cannot be used at all."""


class NoCacheError(UnsafeCacheError):
    """There is no cache folder and none can be made; nobody else's doing."""


def default_folder() -> Path:
    """$FLASHCORE_CACHE_DIR, else flashcore under the user's cache folder (XDG).

    Raises NoCacheError for a user without a home folder, as in a container under a made-up id.
    """
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path there must be ignored.
    if os.path.isabs(base):
        return Path(base) / "flashcore"
    try:
        return Path.home() / ".cache" / "flashcore"
    except RuntimeError:
        raise NoCacheError(
            f"user {os.geteuid()} has no home folder for the cache; set {ENVIRONMENT} to a folder"
        ) from None


def open_folder(folder: Path) -> Path:
    """Create `folder` (mode 0700) if missing, and return it resolved if only its owner can write.

    Raises UnsafeCacheError when it belongs to another user, when group or others may write to it,
    or when another user than root could put something else in its place: some folder above it, or
    above a link on the way to it, is another user's, or is writable by others and not sticky.
    """
    try:
        for place in (*reversed(folder.parents), folder):  # whatever the umask, for no one else
            if not place.exists():
                place.mkdir(mode=0o700, exist_ok=True)
        resolved = folder.resolve(strict=True)
        found = resolved.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = getattr(error, "strerror", None) or error
        raise NoCacheError(
            f"cache folder {folder} cannot be used ({reason}); "
            f"set {ENVIRONMENT} to a folder of your own"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeCacheError(
            f"cache folder {folder} is not a folder; set {ENVIRONMENT} to a folder of your own"
        )
    _check_owner(resolved, found)
    # As the path was given and as it resolves: whoever can replace a link chooses where it leads.
    for place in dict.fromkeys([*Path(os.path.abspath(folder)).parents, *resolved.parents]):
        _check_above(folder, place)
    return resolved


def _check_above(folder: Path, place: Path) -> None:
    """The rule of OpenSSH's StrictModes, which a sticky folder such as /tmp passes: there others
    can add files but not rename ours."""
    for found in (place.lstat(), place.stat()):  # of a link, and of what it leads to
        if found.st_uid not in (0, os.geteuid()):
            raise UnsafeCacheError(
                f"cache folder {folder} lies in {place}, which belongs to user {found.st_uid}; "
                f"set {ENVIRONMENT} to a folder of your own"
            )
    writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if writable and not found.st_mode & stat.S_ISVTX:
        raise UnsafeCacheError(
            f"cache folder {folder} lies in {place}, mode {stat.S_IMODE(found.st_mode):04o}, where "
            f"other users can replace it; run: chmod go-w {place}, or set {ENVIRONMENT} to another "
            "place"
        )


def _check_owner(folder: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise UnsafeCacheError(
            f"cache folder {folder} belongs to user {found.st_uid}, not to you ({os.geteuid()}); "
            f"set {ENVIRONMENT} to a folder of your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeCacheError(
            f"cache folder {folder} has mode {stat.S_IMODE(found.st_mode):04o}: other users can "
            f"write to it; run: chmod go-w {folder}"
        )


@contextmanager
def exclusive_lock(path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold an exclusive lock on `path` between processes; a holder that dies releases it.

    On a file system without locks there is none: then two processes may do the same work; what
    they publish is whole all the same. Raises TimeoutError naming the file after `timeout_s`
    seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{path} was locked by another process for {timeout_s:.0f} s"
                    ) from None
                time.sleep(_POLL_S)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                break
        yield
    finally:
        os.close(descriptor)  # closing releases the lock


def publish(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees all of it or none, even after a crash."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
