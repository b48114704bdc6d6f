"""The machine card of a result, and the rates of the machine."""

import os
from pathlib import Path

import pytest

from smolvla_edge.benchmarks import machine


def test_the_machine_card_names_vector_units_the_gpu_and_the_power_drawn(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\ncase $1 in *name*) echo NVIDIA H200, 580.1;; *) echo 1980;; esac\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    card = machine.watched()()["machine"]
    assert (card.gpu, card.before.gpu_mhz) == ("NVIDIA H200, 580.1", 1980.0)
    flags = set(Path("/proc/cpuinfo").read_text().split())
    known = {"avx2", "avx512_vnni", "asimd"}
    assert known & set(card.cpu.split()) == known & flags
    assert machine.power_w(tmp_path) is None
    for name, text in (("in2_label", "VDD_IN"), ("in2_input", "19000"), ("curr2_input", "500")):
        (tmp_path / "hwmon3").mkdir(exist_ok=True)
        (tmp_path / "hwmon3" / name).write_text(text + "\n")
    assert machine.power_w(tmp_path) == pytest.approx(9.5)


def test_rates_are_measured_of_every_dtype_and_of_copying():
    found = machine.rates("cpu", seconds=0.01)
    assert set(found) == {"float32", "int8", "copy"}
    assert min(found.values()) > 0
    assert machine.before_and_after(found, found).copy_gbs == (round(found["copy"], 1),) * 2
