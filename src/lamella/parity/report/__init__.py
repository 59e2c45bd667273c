"""Results for people and programs: one object, a terminal's tables, and a page."""
