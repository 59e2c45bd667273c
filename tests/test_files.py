"""Writing files: whole or not at all, through no link, and every failure in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamella.errors import CheckpointError, LamellaError, ParameterError, printable
from lamella.files import copy_file, new_folder, write_text


def test_a_text_is_replaced_with_its_permissions(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    file.chmod(0o640)
    write_text(file, "new")
    assert file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_new_file_has_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "a.html", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "a.html").stat().st_mode & 0o777 == 0o644


def test_a_text_goes_to_a_device_as_it_is():
    write_text(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("place", ["no folder", "a folder"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path, place):
    file = tmp_path if place == "a folder" else tmp_path / "nowhere" / "a.html"
    with pytest.raises(ParameterError, match=r"cannot be written \(.+\); make room or get access there") as caught:
        write_text(file, "text", ParameterError)
    assert str(file) in str(caught.value)


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_a_folder_whose_filling_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out"):
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_came_to_exist_is_not_replaced(tmp_path):
    with pytest.raises(CheckpointError, match="is there already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


_KILLED = """
import sys, time
from pathlib import Path
from lamella.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("1")
    print("there", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_has_is_not(tmp_path):
    def start():
        process = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"there\n"
        return process

    killed, live = start(), start()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("1")
        assert len(list(tmp_path.iterdir())) == 2  # the live one's, and this
    live.kill()
    live.wait()
    live.stdout.close()
    killed.stdout.close()


def test_a_link_within_the_folder_or_the_hub_cache_is_copied(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("tokenizer")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/f00")
    (snapshot / "tokenizer.model").symlink_to("tokenizer.json")
    for name in ("tokenizer.json", "tokenizer.model"):
        copy_file(snapshot / name, tmp_path / name, snapshot)
        assert (tmp_path / name).read_text() == "tokenizer" and not (tmp_path / name).is_symlink()


@pytest.mark.parametrize("kind", ["secret", "device", "pipe", "dangling", "loop"])
def test_nothing_but_files_of_the_folder_is_copied(tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "tokenizer_x"
    match kind:
        case "secret":
            (tmp_path / "secret").write_text("secret")
            file.symlink_to(tmp_path / "secret")
        case "device":
            file.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(file)
        case "dangling":
            file.symlink_to("nowhere")
        case _:
            file.symlink_to(file)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"tokenizer_x: (a link to|not a file)"):
        copy_file(file, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists() and time.monotonic() - start < 30


def test_a_folder_of_the_name_is_left_out(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    copy_file(tmp_path / "tokenizer", tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line_that_cannot_control_a_terminal():
    text = str(LamellaError("tensor \x1b]0;title\x07\n\u202e\ud800 é 日本"))
    assert text == "tensor \\x1b]0;title\\x07\\n\\u202e\\ud800 é 日本"
    assert printable("plain text") == "plain text"
