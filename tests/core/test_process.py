"""Child processes of our own: they run the installed package and nothing from the current
folder."""

import ast
import json
import subprocess
import sys

import pytest

from smolvla_edge.core.process import first_line, module_command
from smolvla_edge.devices.arm.guardian import Guardian, GuardianAction
from smolvla_edge.devices.bus.bus import FeetechBus
from smolvla_edge.devices.virtual.virtual_arm import VirtualArm
from support.paths import ROOT

PACKAGES = ("benchmarks", "core", "devices", "export", "quantize", "runtime")
# Names of libraries that the children import, and of our own package.
TRAPS = ("serial", "json", "typing", "numpy", "cv2", "tempfile", "smolvla_edge")
STARTED = "from pathlib import Path\n(Path(__file__).parent / 'ran').write_text(__name__)\n"


@pytest.fixture
def robot_folder(tmp_path, monkeypatch):
    """The current folder holds a robot.toml and files that are named like libraries."""
    (tmp_path / "robot.toml").touch()
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text(STARTED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_virtual_arm_imports_nothing_from_the_current_folder(robot_folder):
    with VirtualArm(width=32, height=24) as arm:
        assert arm.camera_sources
    assert not (robot_folder / "ran").exists()


def test_the_guardian_imports_nothing_from_the_current_folder(robot_folder, virtual):
    with FeetechBus(virtual.port) as bus:
        guardian = Guardian(bus.fileno(), bus.path, GuardianAction.OFF, {1: 1000})
        guardian.beat()
        guardian.dismiss()
    assert not (robot_folder / "ran").exists()


@pytest.mark.parametrize("oldest", [False, True], ids=["this Python", "Python 3.10"])
def test_a_module_runs_with_its_arguments_and_without_the_current_folder(
    oldest, oldest_python, robot_folder, tmp_path_factory, monkeypatch
):
    elsewhere = tmp_path_factory.mktemp("installed")
    (elsewhere / "child.py").write_text(
        "import json, sys, typing\n"
        "def main():\n"
        "    print(json.dumps([sys.argv[1:], sys.path]))\n"
        "    return 3\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    line = module_command("child", "one", python=oldest_python if oldest else sys.executable)
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    arguments, path = json.loads(done.stdout)
    assert arguments == ["one"]
    assert path[0] == str(elsewhere)
    assert not {"", str(robot_folder)} & set(path)
    assert not (robot_folder / "ran").exists()


def test_the_first_line_of_a_child_that_ends_or_says_nothing_is_empty():
    for code in ("", "import time; time.sleep(60)"):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert first_line(process, 60.0 if not code else 0.2) == b""
            process.kill()


def test_only_one_module_starts_python():
    """A command line of our own is `module_command`: no list holds sys.executable, -m or -c."""
    sources = [path for room in PACKAGES for path in (ROOT / room).rglob("*.py")]
    found = [str(path.relative_to(ROOT)) for path in sources if _starts_python(path)]
    assert found == ["core/process.py"]


def _starts_python(path):
    lists = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.List | ast.Tuple)
    ]
    return any(_is_python(element) for one in lists for element in one.elts)


def _is_python(node):
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) == "sys.executable"
    return isinstance(node, ast.Constant) and node.value in ("-m", "-c")
