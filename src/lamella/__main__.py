"""`python -m lamella`: the `lamella` command."""

import sys

from lamella.cli import main

sys.exit(main())
