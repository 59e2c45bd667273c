"""The tree of errors, its export, and the one place of the command line that catches it."""

from __future__ import annotations

import inspect

import pytest

import lamella
from lamella import errors
from lamella.cli import main

pytestmark = pytest.mark.unit

TREE = {
    "LamellaError": "Exception",
    "UserError": "LamellaError",
    "ConfigError": "UserError",
    "CheckpointError": "UserError",
    "ParameterError": "UserError",
    "EngineError": "LamellaError",
    "WorkerError": "EngineError",
    "KernelError": "EngineError",
    "ClosedError": "EngineError",
}


def defined_errors() -> dict[str, type]:
    return {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}


def test_every_error_has_its_place_in_the_tree():
    assert {name: cls.__bases__[0].__name__ for name, cls in defined_errors().items()} == TREE
    assert issubclass(errors.UserError, ValueError) and issubclass(errors.EngineError, RuntimeError)


def test_every_error_is_exported_and_drawn():
    for name, cls in defined_errors().items():
        assert getattr(lamella, name) is cls
        assert name in lamella.__all__
        assert name in errors.__doc__


@pytest.mark.parametrize("name", TREE)
def test_command_line_prints_every_error_as_one_line(name, monkeypatch, capsys):
    def fail(args):
        raise getattr(errors, name)("norm: the kernel is wrong")

    monkeypatch.setattr("lamella.cli.doctor.run", fail)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "lamella: norm: the kernel is wrong\n"
    with pytest.raises(getattr(errors, name)):
        main(["doctor", "--debug"])
