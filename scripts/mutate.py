#!/usr/bin/env python3
"""Check that the tests notice faults: apply one-line faults to a copy of the source, one at a time, and run tests.

Two kinds of faults: those of `scripts/faults.py`, written by hand, and random ones of a seeded generator (operators,
bounds, constants, branches). The tests of a fault are those that execute its line, by a coverage map that is recorded
first and kept; test functions that share rare words with the statement come first, then the cheapest, up to a limit of
CPU time. So a fault that is reported as survived has survived these tests, and the whole suite may still notice it.

Faults of `vllm_plugin` are tested in the environment of `make test-vllm`, by the files that `faults.py` names.

Usage: mutate.py [--listed] [--random N] [--seed S] [--only TEXT] [--json FILE] [--resume FILE] [--record]
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lamella"
CACHE = ROOT / ".cache" / "mutate"
PACKAGES = tuple(
    "validation.py ops layers state engine serve parallel vision checkpoint models config parity vllm_plugin".split()
)
LEFT_OUT = ("parity/report/",)  # how figures are shown
CPU_LIMIT = 40.0  # seconds of tests for a fault, as they took when the map was recorded
WALL_LIMIT = 240.0  # seconds after which a fault counts as noticed: something hangs
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
sys.path.insert(0, str(ROOT / "scripts"))


@dataclass(frozen=True)
class Site:
    """One fault, located.

    Attributes:
        path: of the file, below `src/lamella`.
        line: of the expression, from 1; `statement` is the first line of its statement.
        first, last: characters [first, last) of the file, which `new` replaces.
    """

    path: str
    function: str
    line: int
    statement: int
    first: int
    last: int
    old: str
    new: str
    text: str = field(default="", compare=False)


@dataclass
class Outcome:
    site: Site
    kind: str  # listed or random
    status: str = ""  # killed, survived, equivalent, uncovered
    by: str = ""  # the test that noticed it, or the reason why nothing can
    seconds: float = 0.0
    tests: list[str] = field(default_factory=list)


class SourceFile:
    """A parsed file with its functions by qualified name."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text()
        self.tree = ast.parse(self.text)
        starts = [0]
        for line in self.text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self._starts = starts
        self._statements: dict[int, int] = {}
        for node in ast.walk(self.tree):  # outer statements before inner ones, which then replace them
            if isinstance(node, ast.stmt):
                body = getattr(node, "body", None)
                last = body[0].lineno - 1 if body else node.end_lineno
                self._statements |= dict.fromkeys(range(node.lineno, last + 1), node.lineno)
        self._lines = self.text.splitlines(keepends=True)

    def offset(self, line: int, column: int) -> int:
        """The character at a line from 1 and a column in UTF-8 bytes, as `ast` gives them."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def line_of(self, offset: int) -> int:
        return self.text.count("\n", 0, offset) + 1

    def statement_of(self, line: int) -> int:
        """The first line of the innermost statement, or header of one, that a line is in."""
        return self._statements.get(line, line)

    def text_at(self, line: int) -> str:
        """The lines of a statement up to `line`."""
        return "".join(self._lines[self.statement_of(line) - 1 : line])

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef]]:
        def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield prefix + child.name, child
                    yield from walk(child, f"{prefix}{child.name}.")
                elif isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{prefix}{child.name}.")
                else:
                    yield from walk(child, prefix)

        yield from walk(self.tree, "")


def source_files() -> list[SourceFile]:
    paths = [path for name in PACKAGES for path in sorted((SOURCE / name).rglob("*.py")) or [SOURCE / name]]
    return [SourceFile(path) for path in paths if not str(path.relative_to(SOURCE)).startswith(LEFT_OUT)]


def locate(fault, files: Sequence[SourceFile]) -> Site:
    """Find a listed fault by its function and expression, wherever the function is now.

    Raises:
        SystemExit: the function or the expression is not there, or not there once.
    """
    found = []
    for file in files:
        relative = str(file.path.relative_to(SOURCE))
        if fault.where not in relative:
            continue
        for name, node in file.functions():
            if name == fault.function or name.endswith(f".{fault.function}"):
                first, last = file.span(node)
                count = file.text.count(fault.old, first, last)
                if count:
                    start = file.text.index(fault.old, first, last)
                    stop = start + len(fault.old)
                    line = file.line_of(start)
                    statement = file.statement_of(line)
                    site = Site(relative, name, line, statement, start, stop, fault.old, fault.new, file.text_at(line))
                    found.append((count, site))
    if len(found) != 1 or found[0][0] != 1:
        places = [f"{site.path}:{site.line} ({count} times)" for count, site in found]
        sys.exit(f"faults.py: {fault.function}: {fault.old!r} must be there once, and is in {places or 'no function'}")
    return found[0][1]


_COMPARE = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Mod: "*", ast.BitAnd: "|"}
_SYMBOL = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%", ast.BitAnd: "&"}


def random_sites(file: SourceFile) -> Iterator[Site]:
    """Every place in a file's functions where the generator can make a fault.

    Left out is what cannot change a result: messages, logging, annotations, assertions, `__repr__`, decorators.
    """
    relative = str(file.path.relative_to(SOURCE))

    def site(name: str, node: ast.AST, new: str, first: int | None = None, last: int | None = None) -> Site:
        start, stop = file.span(node)
        start, stop = start if first is None else first, stop if last is None else last
        line = file.line_of(start)
        old = file.text[start:stop]
        return Site(relative, name, line, file.statement_of(line), start, stop, old, new, file.text_at(line))

    def between(left: ast.AST, right: ast.AST) -> tuple[int, int]:
        return file.span(left)[1], file.span(right)[0]

    def swap_operator(name: str, left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Site]:
        first, last = between(left, right)
        text = file.text[first:last]
        if text.count(old) == 1 and "#" not in text:
            at = first + text.index(old)
            line = file.line_of(at)
            yield Site(relative, name, line, file.statement_of(line), at, at + len(old), old, new, file.text_at(line))

    def walk(name: str, node: ast.AST) -> Iterator[Site]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assert | ast.Raise):
                continue
            if isinstance(child, ast.JoinedStr | ast.arguments | ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.AnnAssign):
                if child.value is not None:
                    yield from walk(name, ast.Expr(child.value))
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                called = ast.unparse(child.value.func)
                if called.startswith(("logger.", "print", "bar.", "warnings.")):
                    continue
                if child.col_offset and "\n" not in file.text[slice(*file.span(child))]:
                    yield site(name, child, "pass")
            if isinstance(child, ast.Compare) and len(child.ops) == 1:
                symbols = {"Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">=", "Eq": "==", "NotEq": "!=", "Is": "is",
                           "IsNot": "is not", "In": "in", "NotIn": "not in"}  # fmt: skip
                old = symbols[type(child.ops[0]).__name__]
                yield from swap_operator(name, child.left, child.comparators[0], old, _COMPARE[type(child.ops[0])])
            if isinstance(child, ast.BinOp) and type(child.op) in _ARITHMETIC:
                old = _SYMBOL[type(child.op)]
                sides = (child.left, child.right)
                if not any(isinstance(side, ast.JoinedStr) or _is_text(side) for side in sides):
                    yield from swap_operator(name, child.left, child.right, old, _ARITHMETIC[type(child.op)])
            if isinstance(child, ast.BoolOp):
                old, new = ("and", "or") if isinstance(child.op, ast.And) else ("or", "and")
                yield from swap_operator(name, child.values[0], child.values[1], old, new)
            if isinstance(child, ast.UnaryOp) and isinstance(child.op, ast.Not):
                yield site(name, child, f"bool({file.text[slice(*file.span(child.operand))]})")
            if isinstance(child, ast.Constant):
                if isinstance(child.value, bool):
                    yield site(name, child, str(not child.value))
                elif isinstance(child.value, int):
                    yield site(name, child, str(child.value + 1))
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in ("min", "max"):
                yield site(name, child.func, "max" if child.func.id == "min" else "min")
            if isinstance(child, ast.IfExp):
                yield site(name, child.test, f"not ({file.text[slice(*file.span(child.test))]})")
            if isinstance(child, ast.keyword) and child.arg in ("dtype", "device", "desc", "num_warps", "num_stages"):
                continue
            yield from walk(name, child)

    for name, node in file.functions():
        if name.rsplit(".", 1)[-1] in ("__repr__", "__str__", "self_check", "_checks"):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        yield from walk(name, ast.Module(body, []))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


class TestTexts:
    """The words of test functions, to find the tests that are about a statement."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._words: dict[str, frozenset[str]] = {}
        for path in {test.split("::")[0] for test in tests}:
            file = SourceFile(ROOT / path)
            for name, node in file.functions():
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                text = file.text[file.offset(first, 0) : file.span(node)[1]]
                self._words[f"{path}::{name.replace('.', '::')}"] = frozenset(self._split(text))
        self._counts = Counter(word for words in self._words.values() for word in words)

    @staticmethod
    def _split(text: str) -> list[str]:
        """Names, and the parts of names."""
        names = re.findall(r"[A-Za-z][A-Za-z0-9_]+", text)
        return [*names, *(part for name in names for part in name.lower().split("_") if len(part) > 2)]

    def score(self, function: str, site: Site) -> float:
        """How many rare words a test function shares with the statement and the name of the faulty function."""
        words = self._words.get(function, frozenset()) & set(self._split(f"{site.text} {site.function}"))
        return sum(1 / self._counts[word] for word in words)


class CoverageMap:
    """Which tests execute which lines, and what each test costs."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text())
        self.seconds: dict[str, float] = data["seconds"]
        self.lines: dict[str, dict[str, list[int]]] = data["lines"]  # file -> line -> indices into `tests`
        self.tests: list[str] = data["tests"]
        self.texts = TestTexts(self.tests)

    def indices(self, site: Site) -> list[int]:
        """The tests of the site's line, or, where Python knows no such line, of the one before in the statement."""
        lines = self.lines.get(site.path, {})
        for line in range(site.line, site.statement - 1, -1):
            if str(line) in lines:
                return lines[str(line)]
        return []

    def tests_of(self, site: Site) -> list[str]:
        """The tests that execute the site's line, within the limit.

        First one of each test function: those whose text has the rarest words of the faulty statement, then the
        cheapest.
        """
        known = [self.tests[index] for index in self.indices(site)]
        by_function: dict[str, list[str]] = defaultdict(list)
        for test in sorted(known, key=lambda test: self.seconds.get(test, 1.0)):
            by_function[test.split("[")[0]].append(test)
        scores = {function: self.texts.score(function, site) for function in by_function}
        named = sorted(by_function, key=lambda function: -scores[function])[:20]
        by_function = {f: by_function[f] for f in dict.fromkeys([*(f for f in named if scores[f] > 0), *by_function])}
        chosen, total, turn = [], 0.0, 0
        while any(turn < len(tests) for tests in by_function.values()):
            for tests in by_function.values():
                if turn < len(tests):
                    total += self.seconds.get(tests[turn], 1.0)
                    if total > CPU_LIMIT or len(chosen) == 400:
                        return chosen or tests[:1]
                    chosen.append(tests[turn])
            turn += 1
        return chosen


def record(destination: Path, workers: int) -> None:
    """Run the fast tests once, with coverage by test."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        paths = os.pathsep.join(str(ROOT / name) for name in ("src", "scripts", "tests"))
        environment = os.environ | {"LAMELLA_COVERAGE": scratch, "PYTHONPATH": paths}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "mutate_coverage", "-m", "not slow", "-n", str(workers)]
        command += ["--dist", "loadfile", "-p", "no:cacheprovider", "tests"]
        subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=sys.stderr)
        tests: dict[str, int] = {}
        lines: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        seconds: dict[str, float] = {}
        for part in sorted(Path(scratch).glob("*.json")):
            data = json.loads(part.read_text())
            seconds |= data["seconds"]
            for path, by_line in data["lines"].items():
                for line, names in by_line.items():
                    for name in names:
                        lines[path][int(line)].append(tests.setdefault(name, len(tests)))
        if not lines:
            raise SystemExit(f"no test has executed a line below {SOURCE}: another copy of lamella was imported")
        destination.write_text(json.dumps({"tests": list(tests), "lines": lines, "seconds": seconds}))


class SourceCopy:
    """A copy of the source that faults are applied to, one at a time, and a process that has imported the libraries."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "src"
        self._server = Server()
        shutil.copytree(ROOT / "src", self.source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))

    def run(self, site: Site, tests: Sequence[str], python: str | None = None) -> tuple[str, str]:
        """Apply a fault and run its tests: (status, the test that noticed it)."""
        target = self.source / "lamella" / site.path
        text = target.read_text()
        assert text[site.first : site.last] == site.old
        target.write_text(text[: site.first] + site.new + text[site.last :])
        try:
            try:
                compile(target.read_text(), str(target), "exec")
            except SyntaxError:
                return "invalid", ""
            # Most faults are noticed by one of the first tests, which few files hold: these are imported alone.
            first, second = (0, 0) if python else (10, 50)
            for some in (tests[:first], tests[first:second], tests[second:]):
                status, by = self._pytest(some, python) if some else ("survived", "")
                if status != "survived":
                    break
            return status, by
        finally:
            target.write_text(text)

    def close(self) -> None:
        self._server.close()

    def _pytest(self, tests: Sequence[str], python: str | None) -> tuple[str, str]:
        paths = [str(self.source), str(ROOT / "tests")]
        arguments = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
        if python is None:
            status, output = self._server.run(arguments, paths)
        else:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
            command = ["timeout", "--kill-after=5", str(WALL_LIMIT), python, "-m", "pytest", *arguments]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            status, output = (None if done.returncode == 124 else done.returncode), done.stdout + done.stderr
        if status is None:
            return "killed", "(time limit)"
        if status == 0:
            return "survived", ""
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if not failed and status in (4, 5):
            sys.exit(f"mutate: pytest found no such test: {output[-2000:]}")
        return "killed", failed[0].split(" - ")[0].split(" ", 1)[1] if failed else f"(exit status {status})"


class Server:
    """The process of `mutate_server.py`."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "scripts" / "mutate_server.py"), str(WALL_LIMIT)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, arguments: Sequence[str], paths: Sequence[str]) -> tuple[int | None, str]:
        self._process.stdin.write(json.dumps({"arguments": list(arguments), "paths": list(paths)}) + "\n")
        self._process.stdin.flush()
        status, output = json.loads(self._process.stdout.readline())
        return status, output

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main() -> int:
    from faults import EQUIVALENT, LISTED, VLLM_TESTS

    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--listed", action="store_true", help="only the faults of faults.py")
    arguments.add_argument("--random", type=int, default=200, metavar="N", help="so many random faults")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--only", help="only faults whose path, function or expression has this text")
    arguments.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments.add_argument("--record", action="store_true", help="record the coverage map anew")
    arguments.add_argument("--json", metavar="FILE", help="write all outcomes, as they come")
    arguments.add_argument("--resume", metavar="FILE", help="take over what such a file says was killed")
    args = arguments.parse_args()

    map_file = CACHE / "coverage.json"
    if args.record or not map_file.exists():
        record(map_file, args.workers)
    coverage = CoverageMap(map_file)
    files = source_files()
    outcomes = [Outcome(locate(fault, files), "listed") for fault in LISTED]
    if not args.listed:
        outcomes += [Outcome(site, "random") for site in draw(files, coverage, args.random, args.seed)]
    if args.only:
        outcomes = [o for o in outcomes if args.only in f"{o.site.path} {o.site.function} {o.site.old} -> {o.site.new}"]
    killed = {}
    if args.resume:
        for each in json.loads(Path(args.resume).read_text()):
            if each["status"] == "killed":
                killed[tuple(each["site"][key] for key in ("path", "function", "old", "new", "first"))] = each["by"]
    for outcome in outcomes:
        site = outcome.site
        outcome.by = EQUIVALENT.get((site.function, site.old, site.new, nth(site, files)), "")
        known = killed.get((site.path, site.function, site.old, site.new, site.first))
        if outcome.by:
            outcome.status = "equivalent"
        elif known is not None:
            outcome.status, outcome.by = "killed", known
        elif site.path.startswith("vllm_plugin"):
            outcome.tests = list(VLLM_TESTS)
        else:
            outcome.tests = coverage.tests_of(site)
            outcome.status = "" if outcome.tests else "uncovered"

    done = 0
    todo: SimpleQueue[Outcome] = SimpleQueue()
    pending = [outcome for outcome in outcomes if not outcome.status]
    for outcome in pending:
        todo.put(outcome)

    def work(number: int) -> None:
        nonlocal done
        with tempfile.TemporaryDirectory(prefix="lamella-mutate-") as folder:
            copy = SourceCopy(Path(folder))
            while not todo.empty():
                outcome = todo.get()
                start = time.monotonic()
                in_vllm = outcome.site.path.startswith("vllm_plugin")
                outcome.status, outcome.by = copy.run(
                    outcome.site, outcome.tests, str(VLLM_PYTHON) if in_vllm else None
                )
                outcome.seconds = time.monotonic() - start
                done += 1
                if args.json:
                    Path(args.json).write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
                site = outcome.site
                print(
                    f"[{done}/{len(pending)}] {outcome.status:9} {site.path}:{site.line} {site.function}: "
                    f"{site.old!r} -> {site.new!r}  {outcome.by} {outcome.seconds:.0f} s",
                    flush=True,
                )
            copy.close()

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(work, range(args.workers)))
    return report(outcomes)


def nth(site: Site, files: Sequence[SourceFile]) -> int:
    """Which of the equal expressions of its function a site is, from 0."""
    file = next(file for file in files if str(file.path.relative_to(SOURCE)) == site.path)
    node = next(node for name, node in file.functions() if name == site.function)
    return file.text.count(site.old, file.span(node)[0], site.first)


def draw(files: Sequence[SourceFile], coverage: CoverageMap, count: int, seed: int) -> list[Site]:
    """Random faults, at most one a line, each on a line that some test executes (the plugin's all)."""
    rng = random.Random(seed)
    sites = [site for file in files for site in random_sites(file)]
    sites = [site for site in sites if site.path.startswith("vllm_plugin") or coverage.indices(site)]
    rng.shuffle(sites)
    lines: set[tuple[str, int]] = set()
    chosen = []
    for site in sites:
        if (site.path, site.line) not in lines and len(chosen) < count:
            lines.add((site.path, site.line))
            chosen.append(site)
    return chosen


def report(outcomes: Sequence[Outcome]) -> int:
    """Print the table of killed and survived; returns the exit status."""
    table: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for outcome in outcomes:
        for row in (outcome.site.path.split("/")[0], "all"):
            table[outcome.kind, row][outcome.status] += 1
    status = 0
    for kind, wanted in (("listed", 1.0), ("random", 0.9)):
        rows = {row: counts for (which, row), counts in table.items() if which == kind}
        if not rows:
            continue
        print(f"\n{kind:10} {'killed':>9} {'survived':>9} {'equivalent':>11} {'uncovered':>10}")
        for row in [*sorted(rows.keys() - {"all"}), "all"]:
            counts = rows[row]
            print(
                f"{row:10} {counts['killed']:9} {counts['survived']:9} {counts['equivalent']:11} "
                f"{counts['uncovered']:10}"
            )
        counts = rows["all"]
        judged = counts["killed"] + counts["survived"] + counts["uncovered"]
        if judged and counts["killed"] < wanted * judged:
            status = 1
    for outcome in outcomes:
        if outcome.status in ("survived", "uncovered"):
            site = outcome.site
            print(f"{outcome.status}: {site.path}:{site.line} {site.function}: {site.old!r} -> {site.new!r}")
    return status


if __name__ == "__main__":
    sys.exit(main())
