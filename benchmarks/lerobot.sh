#!/bin/sh
# LeRobot 0.4.4 in an environment of its own, as the reference of smolvla-bench: its pins differ from this package's.
#
#   benchmarks/lerobot.sh PYTHON FOLDER      then: smolvla-bench latency ... --lerobot FOLDER/bin/python
#
# Without its cameras, simulators and training extras. torchvision is a stub where no build fits torch: SmolVLA needs
# the names only.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
"$1" -m venv "$2"
pip="$2/bin/pip install --quiet"
$pip "torch==2.13.*"
$pip "transformers==4.57.*" draccus==0.10.0 einops safetensors "huggingface-hub<0.36" num2words deepdiff termcolor \
    "packaging<26" pyserial gymnasium jsonlines accelerate "datasets==4.*" "diffusers<0.36" imageio av \
    opencv-python-headless
$pip --no-deps lerobot==0.4.4
$pip --editable "$here[export]"
"$2/bin/python" - <<'PYTHON'
import subprocess
import sys
import sysconfig
from pathlib import Path

torch = subprocess.run([sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
line = [sys.executable, "-m", "pip", "install", "--quiet", "torchvision", f"torch=={torch.stdout.strip()}"]
if subprocess.run(line).returncode or subprocess.run([sys.executable, "-c", "import torchvision"]).returncode:
    print("torchvision is not to be had for this torch: writing a stub")
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])
    folder = Path(sysconfig.get_path("purelib"), "torchvision")
    modes = "nearest bilinear bicubic lanczos box hamming nearest-exact".split()
    names = "\n".join(f"    {mode.upper().replace('-', '_')} = {mode!r}" for mode in modes)
    for name, text in {
        ".": '__version__ = "0.0"\n',
        "transforms": f"from enum import Enum\n\n\nclass InterpolationMode(Enum):\n{names}\n",
        "transforms/functional": "",
        "transforms/v2": "class Transform: ...\n\n\nclass Compose: ...\n",
        "transforms/v2/functional": "",
    }.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(text)
PYTHON
"$2/bin/python" -c "import lerobot.policies.smolvla.modeling_smolvla, smolvla_edge.export.checkpoint.checkpoint"
echo "$2/bin/python has LeRobot $("$2/bin/python" -c 'import lerobot; print(lerobot.__version__)')"
