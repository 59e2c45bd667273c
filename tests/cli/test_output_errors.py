"""The command line when its output cannot be written, and with text that could control a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from helpers import canon_checkpoint
from lamella.cli import generate
from lamella.cli.main import main

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


def run(*arguments: str, **options):
    command = [sys.executable, "-m", "lamella", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canon") / "model"
    canon_checkpoint(folder)
    return folder


@pytest.mark.parametrize("command", ["inspect {}", "inspect {} --json", "generate {} --tokens 1,2 --json", "doctor"])
def test_a_full_output_is_one_line(folder, command):
    with open("/dev/full", "w") as full:
        done = run(*command.format(folder).split(), stdout=full)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("lamella: native")]
    assert line.startswith("lamella: ") and "No space left on device" in line


def test_a_closed_pipe_ends_the_command_quietly(folder):
    command = [sys.executable, "-m", "lamella", "inspect", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(120) == 141
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_a_report_that_cannot_be_written_is_one_line(tmp_path, capsys, option):
    target = tmp_path / "report"
    os.symlink("/dev/full", target)
    assert main(["parity", "demo", "stats", "--random", "1", option, str(target)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"lamella: {target}: cannot be written (No space left")


def test_a_conversion_onto_a_full_disk_leaves_nothing(folder, tmp_path):
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); from lamella.cli.main import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", limit, "convert", str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_terminated_conversion_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    canon_checkpoint(source / "model")
    code = (
        "import sys, time; import lamella.checkpoint.convert as c; real = c._write\n"
        "def slow(*a): print('writing', flush=True); time.sleep(60); return real(*a)\n"
        "c._write = slow\nfrom lamella.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", str(source / "model"), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def refused(capsys, *arguments: str) -> str:
    """Run a command that must fail with one line within a minute; return the line."""

    def too_long(*_: object) -> None:
        raise AssertionError("waits for ever")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        assert main(list(arguments)) == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    shown = capsys.readouterr()
    (line,) = shown.err.strip().splitlines()
    assert line.startswith("lamella: ") and line.isprintable() and "\x1b" not in shown.out
    return line


def test_names_in_a_file_cannot_control_the_terminal(tmp_path, capsys):
    canon_checkpoint(tmp_path / "model")
    save_file({"\x1b]0;owned\x07\nmodel.x": torch.zeros(2)}, tmp_path / "model" / "model.safetensors")
    assert "\\x1b]0;owned\\x07\\nmodel.x" in refused(capsys, "generate", str(tmp_path / "model"), "--tokens", "1")


JSON = {
    "deep objects": '{"a": ' * 100_000,
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "a long number": '{"vocab_size": 1' + "0" * 5000 + "}",
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
def test_absurd_json_is_one_line(tmp_path, capsys, text, name):
    folder = tmp_path / "model"
    canon_checkpoint(folder)
    (folder / name).write_text(text)
    assert name in refused(capsys, "generate", str(folder), "--tokens", "1", "--max-tokens", "1")


@pytest.mark.parametrize("names", ["../other.safetensors", "/etc/passwd", "", "a/b.safetensors", ".."])
def test_an_index_names_files_of_its_folder_only(tmp_path, capsys, names):
    folder = tmp_path / "model"
    canon_checkpoint(folder)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": names}}))
    assert "is no file of this folder" in refused(capsys, "generate", str(folder), "--tokens", "1")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_pipe_in_place_of_a_file_does_not_wait(tmp_path, capsys, name):
    folder = tmp_path / "model"
    canon_checkpoint(folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name}: not a file, but a pipe" in refused(capsys, "generate", str(folder), "--tokens", "1")


def test_an_image_that_is_a_pipe_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    line = refused(capsys, "generate", "demo", "-p", "x", "--image", str(tmp_path / "pipe"))
    assert "not a file; give an image file" in line


def test_an_image_path_with_a_zero_byte_is_one_line(capsys):
    assert "embedded null byte" in refused(capsys, "generate", "demo", "-p", "x", "--image", "a\0b")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_generated_text_cannot_control_a_terminal_and_is_unchanged_in_a_pipe(monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    shown = generate._for_output("a\x1b]0;x\x07b\n\tc")
    assert shown == ("a\ufffd]0;x\ufffdb\n\tc" if is_terminal else "a\x1b]0;x\x07b\n\tc")
