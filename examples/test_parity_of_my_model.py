"""Parity of a model with Hugging Face, as a test. Usage: MODEL=FOLDER pytest test_parity_of_my_model.py"""

import os

from lamella.parity import assert_parity


def test_the_engine_is_as_exact_as_hugging_face():
    assert_parity(os.environ.get("MODEL", "demo"), prompts="random", count=4, device="cpu")
