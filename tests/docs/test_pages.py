"""Examples and commands of the pages, run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lamella.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"
HERE = ("getting_started", "generation", "prefix_caching")
# Pages whose examples are run, or are not, elsewhere.
ELSEWHERE = {
    "adding_a_mixer": "test_adding_a_mixer.py",
    "adding_a_model": "test_adding_a_model.py",
    "adding_an_engine_feature": "test_adding_an_engine_feature.py",
    "chat": "real_model/test_smollm2.py",
    "llama4": "not run: needs a checkpoint of Llama 4 and a picture; engine/test_images.py has such requests",
    "parity": "test_parity_page.py",
    "reading_files": "not run: a call without a model of its own; models/test_config.py reads such overrides",
    "supernets": "test_supernets.py",
    "vllm": "not run: reproductions of faults of vLLM, on its models",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("page", HERE)
def test_the_python_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks(page, "python")), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert shown
    if page == "prefix_caching":  # the repeated system prompt hits from the second request on
        cached = [int(line.split(" tokens, ")[1].split()[0]) for line in shown.splitlines()[:3]]
        assert cached[0] == 0 and min(cached[1:]) > 0


COMMANDS = [
    line[2:]
    for page in HERE
    for block in blocks(page, "console")
    for line in block.splitlines()
    if line.startswith("$ ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "lamella"
    assert main(arguments) == 0


def test_every_page_with_an_example_has_a_test():
    pages = {path.stem for path in DOCS.glob("*.md") if "```python" in path.read_text()}
    assert pages == {*HERE, *ELSEWHERE}


def test_links_between_pages_lead_somewhere():
    for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target and target != "api.md":
                assert (path.parent / target).exists(), f"{path.name}: {target}"
