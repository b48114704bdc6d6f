"""smolvla-doctor: on this machine, on files laid out as a Jetson's, with fake drivers, and on the
virtual arm."""

import errno
import fcntl
import hashlib
import json
import os
import struct
import sys
from dataclasses import replace

import pytest
from serial.tools import list_ports
from serial.tools.list_ports_common import ListPortInfo

from smolvla_edge.core.board import Clock, cpu_flags, read_board
from smolvla_edge.core.files import cache_home
from smolvla_edge.core.gpu import Gpu, read_gpu
from smolvla_edge.core.strict import encode
from smolvla_edge.devices.bus.sts3215 import Register
from smolvla_edge.devices.cameras.camera_modes import Mode, Node, read_nodes
from smolvla_edge.runtime.bundle.bundle import Bundle
from smolvla_edge.runtime.commands import doctor
from smolvla_edge.runtime.engines.trt_engine_cache import Key, Record
from smolvla_edge.runtime.robot import doctor as examination
from smolvla_edge.runtime.robot.checkup import cameras, machine, ports
from smolvla_edge.runtime.robot.doctor import MachineFacts
from smolvla_edge.runtime.robot.settings import Settings, read_settings

pytestmark = pytest.mark.arm

NO_GPU = Gpu("", "", "")
ORIN = Gpu("Orin", "12.6", "10.3.0")
# An Orin Nano with JetPack 6.2: contents as owners print them in NVIDIA's forum, and as its
# developer guide says.
JETSON = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release\n",
    "proc/meminfo": "MemTotal:        7802880 kB\nMemFree:          191488 kB\nMemAvailable:    4910080 kB\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0 partition\t3901440\t0\t5\n"
    "/swap file\t8388604\t388604\t-2\n",
    "proc/7/comm": "brltty\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n",
    "var/lib/nvpmodel/status": "pmode:0000",
    "var/lib/dpkg/status": "Package: brltty\nStatus: deinstall ok config-files\nVersion: 6.4\n\n"
    "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2.1+b38\n",
    "usr/local/cuda/version.json": '{"cuda" : {"name" : "CUDA SDK", "version" : "12.6.11"}}',
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1728000\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "51843\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "99000\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone2/temp/asleep": "",  # cannot be read, as while its domain is off
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device1/cur_state": "0\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon3/oc2_event_cnt": "0\n",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "0\n",
}


@pytest.fixture
def jetson(tmp_path):
    """The board of JETSON with some files changed."""

    def board(**changed):
        for name, text in (
            JETSON | {known: changed[k] for k in changed for known in JETSON if k in known}
        ).items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return read_board(tmp_path / "root")

    return board


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """smolvla-doctor in a folder of its own; -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(list_ports, "comports", list)

    def call(*line):
        monkeypatch.setattr(sys, "argv", ["smolvla-doctor", *map(str, line)])
        with pytest.raises(SystemExit) as end:
            doctor.main()
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def saved(fresh, tmp_path, monkeypatch):
    """The arm, its calibration saved where LeRobot does, beside another arm's."""
    monkeypatch.setenv("HF_LEROBOT_CALIBRATION", str(tmp_path / "calibration"))
    folder = tmp_path / "calibration" / "robots" / "so_follower"
    joints = fresh.calibration.joints
    replace(fresh.calibration, joints=(replace(joints[0], homing_offset=1), *joints[1:])).save(
        folder / "another.json"
    )
    fresh.calibration.save(folder / "mine.json")
    (tmp_path / "robot.toml").unlink()
    return fresh


def told(findings, area):
    return [(f.status, f.text, f.do) for f in findings if f.area == area]


def test_a_jetson_is_read_from_its_files(jetson):
    board = jetson()
    assert board.jetson
    assert board.module == "Jetson Orin Nano 8GB (developer kit)"
    assert (board.l4t, board.driver, board.cuda) == ("36.4.7", "540.4.0", "12.6.11")
    assert board.packages == {"nvidia-jetpack": "6.2.1+b38"}
    assert (board.power_mode, board.power_modes[2]) == (0, "MAXN_SUPER")
    assert board.clocks == (Clock("CPU", 729.6, 729.6, 1728), Clock("17000000.gpu", 306, 306, 1020))
    assert board.temperatures == {"cpu-thermal": 51.843}
    assert (board.swap_bytes, board.zram_bytes) == (8_000_000 * 1024, 3901440 * 1024)
    found = list(machine(board))
    assert told(found, "power")[0][::2] == ("warning", "sudo nvpmodel -m 2")
    assert "jetson_clocks" in told(found, "clocks")[0][2]
    assert [f.status for f in found if f.area != "power"] == ["ok"] * 5


def test_the_flags_of_a_cpu_are_read_on_x86_and_on_arm(tmp_path):
    path = tmp_path / "proc/cpuinfo"
    assert cpu_flags(tmp_path) == frozenset()
    path.parent.mkdir()
    for key, flags in (("flags\t\t", {"avx2", "fma"}), ("Features\t", {"asimd", "i8mm"})):
        path.write_text(
            f"processor\t: 0\n{key}: {' '.join(flags)}\n\nprocessor\t: 1\n{key}: other\n"
        )
        assert cpu_flags(tmp_path) == flags


def test_the_fastest_mode_with_pinned_clocks_asks_for_nothing(jetson):
    board = replace(
        jetson(**{"nvpmodel/status": "pmode:0002"}), clocks=(Clock("CPU", 1728, 1728, 1728),)
    )
    assert [f.do for f in machine(board)] == [""] * 6


@pytest.mark.parametrize(
    ("changed", "area", "status", "text"),
    [
        ({"thermal_zone0/temp": "99500"}, "heat", "stop", "cpu-thermal 100 °C, throttles from 99"),
        ({"cooling_device1/cur_state": "1"}, "heat", "stop", "gpu-throttle-alert"),
        ({"oc1_event_cnt": "2"}, "supply", "stop", "2 under-voltage"),
        ({"oc3_event_cnt": "813"}, "supply", "warning", "813 instantaneous over-current"),
        ({"hwmon3/name": "other"}, "supply", "unknown", "no soctherm_oc counters"),
        ({"nvpmodel/status": "", "nvpmodel.conf": ""}, "power", "unknown", "do not tell"),
        ({"nv_tegra_release": "", "dpkg/status": ""}, "jetpack", "unknown", "a container?"),
    ],
)
def test_a_throttled_or_under_volted_jetson_is_told(jetson, changed, area, status, text):
    (found,) = told(machine(jetson(**changed)), area)
    assert found[0] == status
    assert text in found[1]


def test_what_nvpmodel_starts_with_counts_until_it_was_told_otherwise(jetson):
    assert jetson(**{"nvpmodel/status": ""}).power_mode == 1


def test_a_machine_that_tells_nothing_is_no_jetson_and_no_failure(tmp_path):
    found = list(machine(read_board(tmp_path)))
    assert {f.status for f in found} == {"ok", "unknown"}
    assert "Jetson only" in told(found, "jetpack")[0][1]


def test_too_little_memory_for_a_run_or_a_build_stops(jetson, tiny_bundle, monkeypatch):
    monkeypatch.setattr(list_ports, "comports", list)
    chosen = Settings(bundle=str(tiny_bundle), device="cpu")

    def memory(available):
        board = jetson(meminfo=f"MemTotal: 7802880 kB\nMemAvailable: {available} kB\n")
        return told(examination.examine(chosen, MachineFacts(board, ORIN, []))[0], "memory")

    assert [status for status, *_ in memory(4_000_000)] == ["ok", "ok"]
    low = memory(600_000)
    assert [status for status, *_ in low] == ["stop", "ok"]
    assert "0.61 GB of 7.99 GB" in low[0][1]
    assert "an estimate" in low[1][1]
    monkeypatch.setattr(examination, "BUILD_FACTOR", 1e6)
    (_, build) = memory(600_000)
    assert build[0] == "stop"
    assert "swapon" in build[2]


def test_engines_of_another_machine_and_damaged_ones_are_told(
    jetson, tiny_bundle, monkeypatch, tmp_path
):
    monkeypatch.setattr(list_ports, "comports", list)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = Bundle.open(tiny_bundle)
    proved = {bundle.digest: {"key.0": 1e-3, "actions": 2e-3, "chunk": 2e-3}}
    key = Key("prefix.onnx", "0", "fp16", {}, "10.3.0.30", "Orin, compute 8.7, 8 SM")
    good = Record(key, "bundle", hashlib.sha256(b"plan").hexdigest(), {"float16": 7}, proved)
    for name, record in {
        "a": good,
        "b": replace(good, key=replace(key, gpu="NVIDIA Thor, compute 11.0, 20 SM")),
        "c": replace(good, key=replace(key, tensorrt="10.16.2")),
        "d": replace(good, proved={}),
        "e": replace(good, plan_sha256="0"),
        "f": None,
    }.items():
        folder = cache_home() / "engines" / name
        folder.mkdir(parents=True)
        (folder / "engine.plan").write_bytes(b"plan")
        (folder / "engine.json").write_text(json.dumps(encode(record)))
    found = told(
        examination.examine(Settings(bundle=str(tiny_bundle)), MachineFacts(jetson(), ORIN, []))[0],
        "engines",
    )
    assert [status for status, *_ in found] == [
        "ok",
        "warning",
        "warning",
        "ok",
        "warning",
        "warning",
    ]
    for (_, text, _), words in zip(
        found,
        ("7 float16; self-check: passed, actions within 2.0e-03", "another machine", "another TensorRT",
         "not done for this bundle", "its hash differs", "is damaged: the document is None"),
        strict=True,
    ):  # fmt: skip
        assert words in text


def test_nvidia_libraries_are_asked_for_their_versions():
    class Driver:
        def cuDriverGetVersion(self, number):  # noqa: N802
            number._obj.value = 13020
            return 0

        def cuInit(self, flags):  # noqa: N802
            return 0

        def cuDeviceGet(self, device, index):  # noqa: N802
            return 0

        def cuDeviceGetName(self, text, size, device):  # noqa: N802
            text.value = b"Orin"

        def getInferLibVersion(self):  # noqa: N802
            return 101602

    def load(name):
        if name not in ("libcuda.so.1", "libnvinfer.so.10"):
            raise OSError(name)
        return Driver()

    assert read_gpu(load) == Gpu("Orin", "13.2", "10.16.2")


def test_camera_nodes_tell_their_real_modes(tmp_path, monkeypatch):
    """Two nodes of a webcam: pictures and metadata; and one whose sizes are a range."""
    modes = {b"MJPG": {(640, 480): (1, 30), (1280, 720): (1, 60)}, b"YUYV": {(640, 480): (2, 15)}}
    for name in ("video0", "video1", "video2"):
        (tmp_path / name).write_text(name)
    (tmp_path / "v4l/by-path").mkdir(parents=True)
    (tmp_path / "v4l/by-path/usb-1").symlink_to(tmp_path / "video0")

    def driver(fd, request, data):
        name = os.pread(fd, 10, 0).decode()
        index = struct.unpack_from("=I", data)[0]
        formats = modes if name == "video0" else {b"UYVY": {}}
        try:
            if request == 0x80685600:
                own = 0x00800000 if name == "video1" else 0x04000001
                return struct.pack(
                    "=16s32s32sIII", b"uvcvideo", b"A webcam", b"usb", 0, 0x84A00001, own
                ) + bytes(12)
            if request == 0xC0405602:
                assert data[4:8] == struct.pack("=I", 1)
                return data[:44] + list(formats)[index] + data[48:]
            if request == 0xC02C564A and name == "video0":
                return data[:8] + struct.pack("=III", 1, *list(modes[data[4:8]])[index]) + data[20:]
            if request == 0xC02C564A:
                return data[:8] + struct.pack("=7I", 3, 32, 1920, 8, 32, 1080, 8) + data[36:]
            size = struct.unpack_from("=II", data, 8)
            rates = [modes[data[4:8]][size]] if name == "video0" else []
            return data[:16] + struct.pack("=III", 1, *rates[index]) + data[28:]
        except IndexError:
            raise OSError(errno.EINVAL, "no more") from None

    monkeypatch.setattr(fcntl, "ioctl", driver)
    nodes = read_nodes(tmp_path)
    assert [node.path for node in nodes] == [str(tmp_path / f"video{i}") for i in range(3)]
    assert nodes[0].link == str(tmp_path / "v4l/by-path/usb-1")
    assert nodes[0].card == "A webcam"
    assert list(map(str, nodes[0].modes)) == [
        "MJPG 640x480@30",
        "MJPG 1280x720@60",
        "YUYV 640x480@7.5",
    ]
    assert "not the camera's first node" in nodes[1].problem
    assert nodes[2].modes == (Mode("UYVY", 640, 480, 0), Mode("UYVY", 1920, 1080, 0))
    found = list(cameras(nodes, {}))
    assert [f.status for f in found] == ["ok", "unknown", "warning"]


def test_a_file_that_is_no_camera_and_one_nobody_may_open_are_told(tmp_path, monkeypatch):
    (tmp_path / "video0").touch()
    assert "does not answer" in read_nodes(tmp_path)[0].problem

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert "group video" in read_nodes(tmp_path)[0].problem


def test_a_camera_of_the_settings_must_be_a_usable_node():
    node = Node(
        "/dev/video0", "/dev/v4l/by-path/usb-1", "A webcam", (Mode("MJPG", 640, 480, 30),), ""
    )
    sources = {"front": "/dev/video0", "wrist": "2", "top": "picture.png"}
    found = [f for f in cameras([node], sources) if f.status == "stop"]
    assert len(found) == 1
    assert "'wrist' is 2" in found[0].text


def test_an_adapter_nobody_may_open_comes_with_a_udev_rule_and_brltty_is_named(
    tmp_path, jetson, monkeypatch
):
    device = tmp_path / "ttyACM0"
    device.touch()
    port = ListPortInfo(str(device))
    port.vid, port.pid = 0x1A86, 0x55D3
    monkeypatch.setattr(list_ports, "comports", lambda: [port])
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    refused, brltty = ports(jetson())
    assert refused.status == brltty.status == "warning"
    assert f"usermod -aG {device.group()} " in refused.do
    assert 'ATTRS{idVendor}=="1a86", ATTRS{idProduct}=="55d3"' in refused.do
    assert "brltty is running" in brltty.text
    monkeypatch.setattr(os, "access", lambda *arguments: True)
    assert next(ports(jetson())).status == "ok"


def test_a_healthy_arm_is_read_and_not_written_to(saved, tiny_bundle, run):
    code, out, _ = run("--bundle", tiny_bundle, "--port", saved.port, "--device", "cpu")
    assert code == 0, out
    assert out.count("firmware 3.10") == 6
    assert "mine.json" in out
    assert saved.writes() == []
    assert saved.goals() == []


def test_a_wrong_servo_stops(saved, run):
    saved.force(3, Register.MODEL_NUMBER, 1234)
    code, out, err = run("--port", saved.port)
    assert code == 1
    assert "elbow_flex (3): model 1234, expected 777" in out
    assert "would stop a run: servos" in err


def test_an_arm_that_was_never_calibrated_stops(fresh, run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LEROBOT_CALIBRATION", str(tmp_path / "none"))
    assert "no saved calibration is what they hold" in run("--port", fresh.port)[1]
    for register, value in ((Register.HOMING_OFFSET, 0), (Register.MIN_POSITION_LIMIT, 0)):
        fresh.set_register(2, register, value)
    fresh.set_register(2, Register.MAX_POSITION_LIMIT, 4095)
    code, out, _ = run("--port", fresh.port)
    assert code == 1
    assert "not calibrated, as from the factory: shoulder_lift (2)" in out
    assert f"smolvla-calibrate --port {fresh.port}" in out


def test_a_calibration_of_another_arm_stops(saved, run, tmp_path):
    (tmp_path / "robot.toml").write_text('calibration = "another"\n')
    code, out, _ = run("--port", saved.port)
    assert code == 1
    assert "Homing_Offset (31) is -709 in the servo, 1 in" in out


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_missing_or_damaged_bundle_stops(tiny_bundle, run, damage):
    (tiny_bundle / ("manifest.json" if damage == "missing" else "expert.onnx")).unlink()
    code, out, err = run("--bundle", tiny_bundle)
    assert code == 1
    assert ("has no manifest.json" if damage == "missing" else "expert.onnx cannot be read") in out
    assert "bundle" in err


def test_nothing_named_is_nothing_to_stop(run):
    code, out, _ = run()
    assert code == 0
    assert "--bundle FOLDER" in out


def test_wrong_settings_and_a_device_that_is_not_there_stop(run, tmp_path):
    (tmp_path / "robot.toml").write_text("speed = 3\n")
    code, _, err = run("--device", "tpu")
    assert code == 1
    assert "settings, device" in err


def test_the_virtual_arm_needs_no_port_and_json_parses(run, tiny_bundle):
    code, out, _ = run("--port", "sim", "--bundle", tiny_bundle, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["format"] == "smolvla-edge-doctor"
    assert sum("firmware" in f["text"] for f in found["findings"] if f["area"] == "servos") == 6


def test_a_drafted_robot_toml_is_read_back_and_holds_what_was_found(
    saved, run, tiny_bundle, tmp_path
):
    path = tmp_path / "drafted.toml"
    assert run("--port", saved.port, "--bundle", tiny_bundle, "--write-config", path)[0] == 0
    read = read_settings(path, required=True)
    assert (read.bundle, read.port) == (str(tiny_bundle), saved.port)
    assert read.calibration.endswith("so_follower/mine.json")
    assert (read.task, read.cameras) == (None, {})
    assert '# "front" = "/dev/video0"  # found: none' in path.read_text()
    before = path.read_bytes()
    code, _, err = run("--write-config", path)
    assert code == 2
    assert "exists already" in err
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))


def test_a_draft_takes_the_only_camera_and_never_guesses_between_two(export_case):
    manifest = Bundle.open(export_case("tiny", "fp32")).manifest
    nodes = [Node(f"/dev/video{i}", f"/dev/video{i}", "", (), "") for i in (0, 2)]
    chosen = Settings(cameras={"front": "/dev/video0"}, task='say "é😀"')
    text = examination.draft(chosen, manifest, None, None, nodes)
    assert '"wrist" = "/dev/video2"' in text.splitlines()
    assert 'task = "say \\"é😀\\""' in text
    both = examination.draft(Settings(), manifest, None, None, nodes).splitlines()
    assert '# "wrist" = "/dev/video0"  # found: /dev/video0, /dev/video2' in both


@pytest.mark.parametrize("widths", [(7, 7), (6, 7)])
def test_a_draft_for_a_bundle_of_another_width_leaves_the_units_open(export_case, widths):
    manifest = Bundle.open(export_case("tiny", "fp32")).manifest

    def widened(vector, width):
        statistics = {"min": (-150.0,) * width, "max": (150.0,) * width}
        normalization = replace(vector.normalization, statistics=statistics)
        return replace(vector, dim=width, normalization=normalization)

    state, action = (
        widened(v, w) for v, w in zip((manifest.state, manifest.action), widths, strict=True)
    )
    manifest = replace(manifest, units=None, state=state, action=action)
    text = examination.draft(Settings(), manifest, None, None, [])
    assert "\n# units = " in text


def test_the_budget_of_a_bundle_on_a_named_board_on_all_and_on_this_one(
    export_case, jetson, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    bundle = str(export_case("tiny", "fp32"))

    def asked(*options):
        monkeypatch.setattr(sys, "argv", ["smolvla-doctor", "--bundle", bundle, *options])
        with pytest.raises(SystemExit) as done:
            doctor.main()
        return done.value.code, capsys.readouterr()

    code, said = asked("--board", "orin nano super")
    assert code == 0
    assert "Orin Nano 8GB Super: 16.71 TFLOPS FP16" in said.out
    assert "measured" not in said.out.split("30 ms")[1]
    assert len(json.loads(asked("--board", "all", "--json")[1].out)["boards"]) == 11
    code, said = asked("--board", "raspberry pi")
    assert (
        code,
        "board 'raspberry pi' is unknown, expected one of: Orin Nano 4GB" in said.err,
    ) == (2, True)
    if not read_board().jetson:
        assert "this is no Jetson" in asked("--budget")[1].err
    here = jetson()
    monkeypatch.setattr(examination, "read_board", lambda: here)
    assert "of the board's GPU" in asked("--budget", "--device", "cpu")[1].err
    load = examination.Policy.load
    monkeypatch.setattr(examination.Policy, "load", lambda opened, *_, **__: load(opened, "cpu"))
    code, said = asked("--budget", "--json")
    data = json.loads(said.out)
    assert data["board"]["name"] == "Orin Nano 8GB Super"
    assert data["stages"]["chunk"]["measured"] > data["stages"]["prefix"]["measured"] > 0
