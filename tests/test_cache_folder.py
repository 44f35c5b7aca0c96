"""Who may write to the cache folder, and to what lies above it: entries are code that is run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from flashcore.jit import folder
from flashcore.jit.folder import UnsafeCacheError, default_folder, exclusive_lock, open_folder


def test_new_folder_is_private(tmp_path: Path) -> None:
    made = open_folder(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722, 0o1777])
def test_folder_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(UnsafeCacheError, match=f"mode {mode:04o}: other users can write"):
        open_folder(shared)


def test_readable_folder_is_accepted(tmp_path: Path) -> None:
    folder_path = tmp_path / "readable"
    folder_path.mkdir()
    folder_path.chmod(0o755)
    assert open_folder(folder_path) == folder_path.resolve()


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        foreign = tmp_path / "foreign"
        foreign.mkdir(mode=0o700)
        os.chown(foreign, 12345, 12345)
    else:
        foreign = tmp_path
        monkeypatch.setattr(folder.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UnsafeCacheError, match="belongs to user"):
        open_folder(foreign)


def test_folder_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(
        UnsafeCacheError,
        match=r"open, mode 0777, where other users can replace it; run: chmod go-w",
    ):
        open_folder(tmp_path / "open" / "mine")
    (tmp_path / "open").chmod(0o1777)  # as /tmp is
    assert open_folder(tmp_path / "open" / "mine").name == "mine"


def test_link_to_a_shared_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    with pytest.raises(UnsafeCacheError, match="other users can write"):
        open_folder(tmp_path / "link")


def test_file_in_the_way_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnsafeCacheError, match="FLASHCORE_CACHE_DIR"):
        open_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FLASHCORE_CACHE_DIR": "/somewhere/else"}, "/somewhere/else"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/flashcore"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/flashcore"),
        ({}, "/home/me/.cache/flashcore"),
    ],
)
def test_default_folder(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("FLASHCORE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == Path(expected)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
@pytest.mark.parametrize("levels", [1, 3])
def test_no_folder_above_may_be_written_by_others(tmp_path: Path, mode: int, levels: int) -> None:
    above = tmp_path / "above"
    mine = above.joinpath(*"abc"[:levels])
    open_folder(mine)
    above.chmod(mode)
    with pytest.raises(UnsafeCacheError, match=f"lies in {above}, mode {mode:04o}"):
        open_folder(mine)
    above.chmod(mode | 0o1000)  # others may add, and rename nothing of ours
    assert open_folder(mine) == mine.resolve()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_no_folder_above_may_be_another_user_s(tmp_path: Path) -> None:
    above = tmp_path / "above"
    open_folder(above / "mine")
    os.chown(above, 12345, 12345)
    with pytest.raises(UnsafeCacheError, match=f"lies in {above}, which belongs to user 12345"):
        open_folder(above / "mine")


def test_a_link_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    open_folder(tmp_path / "mine")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "link").symlink_to(tmp_path / "mine")
    assert open_folder(shared / "link") == (tmp_path / "mine").resolve()
    shared.chmod(0o777)
    with pytest.raises(UnsafeCacheError, match=f"lies in {shared}, mode 0777"):
        open_folder(shared / "link")


def test_links_in_a_circle_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UnsafeCacheError, match="FLASHCORE_CACHE_DIR"):
        open_folder(tmp_path / "a")


def test_folders_above_are_made_for_one_user_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        made = open_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (made, made.parent, made.parent.parent)] == [
        0o700
    ] * 3


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder.fcntl, "flock", refuse)
    with exclusive_lock(tmp_path / "key.lock", timeout_s=0.0):
        pass


def test_another_failure_of_the_lock_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder.fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"), exclusive_lock(tmp_path / "key.lock"):
        pass
