"""Report of a parity run: a result object, tables for the terminal, and an HTML page."""
