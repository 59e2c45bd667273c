"""docs/adding_an_engine_feature.md, followed word for word in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lamella.engine.loading import load_engine
from lamella.engine.options import EngineOptions
from lamella.engine.steps.features import StepFeature, StepFeatures
from lamella.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "adding_an_engine_feature.md"


def test_the_page_runs_as_written(tmp_path):
    blocks = re.findall(r"```python\n# file: (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["soft_prompt.py", "run.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "a soft prompt says what its tokens would say"


def test_two_features_cannot_give_the_same_attribute():
    class Gives(StepFeature):
        def context(self, form, tensors, chunks):
            return {"given": 1}

    with pytest.raises(ValueError, match="two step features define given"):
        StepFeatures([Gives(), Gives()]).context((None, None), {}, ())


def test_features_are_refused_where_other_ranks_would_lack_them():
    with pytest.raises(ConfigError, match=r"^features: only with tensor_parallel_size=1"):
        load_engine(EngineOptions(model="demo", device="cpu", tensor_parallel_size=2), [StepFeature()])
