"""The cache of the native kernels' library: only a library that no other user could have written is loaded."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import subprocess
import threading

import pytest

from lamella.ops.native import bindings, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a library of one function in place of the kernels, which compiles in a moment."""
    unit = tmp_path / "unit.cpp"
    unit.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "_UNIT", unit)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "lamella"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_library_is_private_and_found_again(cache):
    old = os.umask(0)
    try:
        library = build.build()
    finally:
        os.umask(old)
    for path in (cache, library.parent, library):
        assert not path.stat().st_mode & 0o022, path
    changed = library.stat().st_mtime_ns
    assert build.build() == library and library.stat().st_mtime_ns == changed


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "no checksum", "checksum of another"])
def test_a_damaged_library_is_built_again(cache, damage):
    library = build.build()
    good = library.read_bytes()
    checksum = library.with_suffix(".sha256")
    match damage:
        case "empty":
            library.write_bytes(b"")
        case "truncated":
            library.write_bytes(good[: len(good) // 2])
        case "flipped":
            library.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        case "no checksum":
            checksum.unlink()
        case _:
            checksum.write_text("0" * 64)
    assert build.build().read_bytes() == good


def test_a_library_that_others_can_write_to_is_built_again(cache):
    library = build.build()
    good = library.read_bytes()
    library.write_bytes(b"planted")
    library.chmod(0o777)
    assert build.build().read_bytes() == good and not library.stat().st_mode & 0o022


def test_what_is_in_a_folder_that_others_could_write_to_is_not_loaded(cache):
    library = build.build()
    good = library.read_bytes()
    library.write_bytes(b"planted")
    library.with_suffix(".sha256").write_text(hashlib.sha256(b"planted").hexdigest())
    library.parent.chmod(0o777)
    assert build.build().read_bytes() == good
    assert not stat.S_IMODE(library.parent.stat().st_mode) & 0o022


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["cache", "folder", "library"])
def test_what_belongs_to_another_user_is_not_loaded(cache, which):
    library = build.build()
    good = library.read_bytes()
    library.write_bytes(b"planted")
    os.chown({"cache": cache, "folder": library.parent, "library": library}[which], 65534, 65534)
    if which == "library":
        assert build.build().read_bytes() == good
    else:
        with pytest.raises(OSError, match="belongs to another user: remove it, or set XDG_CACHE_HOME"):
            build.build()


@pytest.mark.parametrize("place", ["folder", "link"])
def test_something_else_in_the_librarys_place_is_refused(cache, place, tmp_path):
    library = build.build()
    library.unlink()
    if place == "folder":
        library.mkdir()
    else:
        library.symlink_to(tmp_path / "unit.cpp")
    with pytest.raises(OSError, match="is not a file: remove it"):
        build.build()


def test_a_compiler_that_hangs_is_ended(cache, tmp_path, monkeypatch):
    slow = script(tmp_path / "slow", '[ "$1" = --version ] && { echo v; exit; }\nexec sleep 1000')
    monkeypatch.setenv("CXX", slow)
    monkeypatch.setenv("LAMELLA_NATIVE_TIMEOUT", "0.5")
    with pytest.raises(subprocess.TimeoutExpired):
        build.build()


COMPILERS = {
    "fails": "echo 'fatal error: no' >&2; exit 1",
    "writes nothing": "echo v1",
    "writes junk": 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo junk > "$2"; shift; done',
    "speaks no UTF-8": "printf '\\377\\376 bad'; exit 1",
}


@pytest.mark.parametrize("name", COMPILERS)
def test_every_fault_of_the_compiler_leaves_the_portable_path(cache, tmp_path, monkeypatch, caplog, name):
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", COMPILERS[name]))
    assert_falls_back(caplog)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CXX", "/nope"), ("CXX", "g++ '"), ("LAMELLA_NATIVE_MARCH", "nope"), ("LAMELLA_NATIVE_TIMEOUT", "soon")],
)
def test_bad_settings_leave_the_portable_path(cache, monkeypatch, caplog, variable, value):
    monkeypatch.setenv(variable, value)
    assert_falls_back(caplog)


def test_a_cache_that_cannot_be_written_leaves_the_portable_path(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_falls_back(caplog)


def test_a_library_without_the_kernels_leaves_the_portable_path(cache, caplog):
    assert_falls_back(caplog)  # the unit of this test exports none


def assert_falls_back(caplog):
    with caplog.at_level(logging.WARNING, logger="lamella"):
        reason = bindings.why_unavailable.__wrapped__()
    assert reason and "\n" not in reason
    assert [record.getMessage() for record in caplog.records] == [
        f"native CPU kernels are off ({reason}): using the portable torch path"
    ]


def test_processes_that_start_at_once_get_one_library(cache):
    found = []
    threads = [threading.Thread(target=lambda: found.append(build.build())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert sorted(path.name for path in found[0].parent.iterdir()) == ["kernels.sha256", "kernels.so", "lock"]
