"""Make the training script importable as `train`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "train_demo"))
