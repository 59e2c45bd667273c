"""Runs pytest again and again in forks of a process that has imported the libraries, for `mutate.py`.

Reads a line of JSON, `{"arguments": [...], "paths": [...]}`, runs pytest with these arguments in a fork whose
`sys.path` begins with these paths, and answers `[exit status, end of the output]`, the status null if time ran out.
lamella itself is not imported before the fork, since each fork has another.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py does, before Triton is imported
LIBRARIES = """
    hypothesis msgspec numpy pytest rich safetensors.torch tokenizers torch tqdm transformers triton triton.language
    transformers.models.llama.modeling_llama transformers.models.llama4.modeling_llama4
    transformers.models.qwen3.modeling_qwen3 _pytest.assertion.rewrite xdist
""".split()
MEMORY = 9 << 30


def run(arguments: list[str], paths: list[str], output: str) -> None:
    """In the fork: never returns."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    import pytest

    status = 3
    try:
        status = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    limit = float(sys.argv[1])
    for name in LIBRARIES:
        import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.NamedTemporaryFile() as output:
            child = os.fork()
            if child == 0:
                run(order["arguments"], order["paths"], output.name)
            end, status = time.monotonic() + limit, None
            while time.monotonic() < end:
                done, code = os.waitpid(child, os.WNOHANG)
                if done:
                    status = os.waitstatus_to_exitcode(code)
                    break
                time.sleep(0.05)
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            if status is None:
                os.waitpid(child, 0)
            text = Path(output.name).read_text(errors="replace")[-20_000:]
        print(json.dumps([status, text]), flush=True)


if __name__ == "__main__":
    main()
