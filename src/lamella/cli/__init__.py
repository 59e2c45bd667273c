"""The `lamella` command."""

from lamella.cli.main import main as main
