"""Facts that a machine tells in /proc, /sys, /etc and in dpkg's list. Files are only read.

Sources: NVIDIA Jetson Linux Developer Guide r36 and r38 (module numbers; nvpmodel's files; throttle
alerts; the soctherm_oc counters), the kernel's ABI documents on sysfs (cpufreq, devfreq, thermal),
proc(5).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODULES = {
    "p3767-0000": "Jetson Orin NX 16GB",
    "p3767-0001": "Jetson Orin NX 8GB",
    "p3767-0003": "Jetson Orin Nano 8GB",
    "p3767-0004": "Jetson Orin Nano 4GB",
    "p3767-0005": "Jetson Orin Nano 8GB (developer kit)",
    "p3701-0000": "Jetson AGX Orin (developer kit)",
    "p3701-0004": "Jetson AGX Orin 32GB",
    "p3701-0005": "Jetson AGX Orin 64GB",
    "p3701-0008": "Jetson AGX Orin Industrial",
}
PACKAGES = ("brltty", "nvidia-jetpack", "nvidia-l4t-core")
INSTALLED = r"^Package: {}\nStatus: .* installed\n(?:.+\n)*?Version: (.+)"
EVENTS = {
    "oc1": "under-voltage",
    "oc2": "average over-current",
    "oc3": "instantaneous over-current",
}
_GPU = re.compile("gpu|ga10b|gv11b")  # as devfreq calls it: Orin, Thor; older kernels; Xavier


@dataclass(frozen=True)
class Clock:
    """MHz: now, and the bounds it moves in; equal bounds are a pinned clock."""

    name: str
    now: float
    low: float
    high: float


@dataclass(frozen=True)
class Board:
    """An empty value or None: the machine does not tell. Memory in bytes, temperatures in °C."""

    name: str
    module: str  # of a Jetson: what sits on the carrier board
    jetson: bool
    l4t: str
    cpu: str
    kernel: str
    driver: str  # of NVIDIA, in the kernel
    cuda: str  # toolkit
    packages: dict[str, str]  # those of PACKAGES that are installed -> version
    processes: frozenset[str]
    power_modes: dict[int, str]
    power_mode: int | None
    clocks: tuple[Clock, ...]
    temperatures: dict[str, float]
    throttled: tuple[str, ...]  # now, by heat
    # Supply events since the start. Each event throttled the board.
    events: dict[str, int] | None
    memory_bytes: int
    available_bytes: int
    swap_bytes: int  # free, on disk
    zram_bytes: int  # swap that is memory itself


def read_board(root: Path = Path("/")) -> Board:
    """Never raises: what cannot be read is empty."""
    tree = root / "proc/device-tree"
    parts = _text(tree / "compatible").replace("\0", " ")
    numbers = re.findall(r"p\d{4}-\d{4}", parts)  # of the carrier board, then of the module
    l4t = _found(r"R(\d+) \(release\), REVISION: ([\d.]+)", root / "etc/nv_tegra_release")
    dpkg, modes = root / "var/lib/dpkg/status", root / "etc/nvpmodel.conf"
    # What nvpmodel was last told, else what it starts with.
    mode = _found(r"pmode:(\d+)", root / "var/lib/nvpmodel/status") or _found(
        r"PM_CONFIG DEFAULT=(\d+)", modes
    )
    memory = dict(re.findall(r"(\w+):\s+(\d+) kB", _text(root / "proc/meminfo")))
    swaps = re.findall(r"^(/\S+)\s+\S+\s+(\d+)\s+(\d+)", _text(root / "proc/swaps"), re.M)
    return Board(
        name=_text(tree / "model") or _text(root / "sys/class/dmi/id/product_name"),
        module=MODULES.get(numbers[-1], numbers[-1]) if numbers else "",
        jetson="nvidia,tegra" in parts or l4t != "",
        l4t=l4t,
        cpu=cpu_info(root).get("model name") or platform.machine(),
        kernel=_text(root / "proc/sys/kernel/osrelease"),
        driver=_found(r"\s(\d+\.[\d.]+)\s", root / "proc/driver/nvidia/version"),
        cuda=_found(
            r'"cuda"\s*:\s*{[^}]*"version"\s*:\s*"([^"]+)', root / "usr/local/cuda/version.json"
        ),
        packages={
            name: version for name in PACKAGES if (version := _found(INSTALLED.format(name), dpkg))
        },
        processes=frozenset(_text(path) for path in root.glob("proc/[0-9]*/comm")),
        power_modes={
            int(i): name for i, name in re.findall(r"POWER_MODEL ID=(\d+) NAME=(\S+)", _text(modes))
        },
        power_mode=int(mode) if mode else None,
        clocks=tuple(_clocks(root)),
        temperatures={name: celsius for name, celsius, _ in _zones(root)},
        throttled=tuple(_throttled(root)),
        events=_events(root),
        memory_bytes=1024 * int(memory.get("MemTotal", 0)),
        available_bytes=1024 * int(memory.get("MemAvailable", 0)),
        swap_bytes=sum(
            1024 * (int(size) - int(used)) for name, size, used in swaps if "zram" not in name
        ),
        zram_bytes=sum(1024 * int(size) for name, size, _ in swaps if "zram" in name),
    )


def cpu_info(root: Path = Path("/")) -> dict[str, str]:
    """The fields of the first CPU in /proc/cpuinfo; empty if it cannot be read."""
    first = _text(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = [line.partition(":") for line in first.splitlines()]
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Instruction sets of the CPU as Linux names them ("flags" on x86, "Features" on Arm)."""
    info = cpu_info(root)
    return frozenset(f"{info.get('flags', '')} {info.get('Features', '')}".split())


def has_vnni(root: Path = Path("/")) -> bool:
    """Whether this CPU adds 8-bit products in 32 bits.

    An x86 CPU without VNNI adds pairs of them in 16 bits, which overflows. Other architectures do
    not overflow.
    """
    vnni = {"avx512_vnni", "avx_vnni"}
    return platform.machine() != "x86_64" or not vnni.isdisjoint(cpu_flags(root))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:  # missing, not for this user, or a sensor that sleeps
        return ""


def _found(pattern: str, path: Path) -> str:
    """What the groups of `pattern` match in the file, joined by dots; empty where it does not."""
    match = re.search(pattern, _text(path), re.M)
    return ".".join(match.groups()) if match else ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _clocks(root: Path) -> Iterator[Clock]:
    """The CPUs as one, and every GPU clock."""
    cpus = [
        [_number(policy / f"scaling_{what}_freq") for what in ("cur", "min", "max")]
        for policy in root.glob("sys/devices/system/cpu/cpufreq/policy*")
    ]
    # kHz -> MHz
    known = [[value / 1e3 for value in cpu if value is not None] for cpu in cpus if None not in cpu]
    if known:
        now, low, high = zip(*known, strict=True)
        yield Clock("CPU", max(now), min(low), max(high))
    for folder in sorted(root.glob("sys/class/devfreq/*")):
        values = [_number(folder / f"{what}_freq") for what in ("cur", "min", "max")]
        if _GPU.search(folder.name) and None not in values:
            yield Clock(folder.name, *(value / 1e6 for value in values if value is not None))


def _zones(root: Path) -> Iterator[tuple[str, float, float]]:
    """-> name, °C, and where the zone begins to throttle."""
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        if (now := _number(zone / "temp")) is not None:
            trips = [
                _number(kind.with_name(kind.name.replace("_type", "_temp"))) or 0
                for kind in zone.glob("trip_point_*_type")
                if _text(kind) == "passive"
            ]
            limits = [trip / 1e3 for trip in trips if trip > 0]  # 0 and below: not set
            yield _text(zone / "type"), now / 1e3, min(limits, default=float("inf"))


def _throttled(root: Path) -> Iterator[str]:
    for name, celsius, limit in _zones(root):
        if celsius >= limit:
            yield f"{name} {celsius:.0f} °C, throttles from {limit:.0f}"
    for device in sorted(root.glob("sys/class/thermal/cooling_device*")):
        if _text(device / "type").endswith("throttle-alert") and _number(device / "cur_state"):
            yield _text(device / "type")


def _events(root: Path) -> dict[str, int] | None:
    for folder in root.glob("sys/class/hwmon/hwmon*"):
        if _text(folder / "name") == "soctherm_oc":
            return {what: _number(folder / f"{oc}_event_cnt") or 0 for oc, what in EVENTS.items()}
    return None
