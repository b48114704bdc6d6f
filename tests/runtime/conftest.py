"""Fixtures of the runtime's tests."""

import json
import sys

import pytest

from support.paths import STANDINS


@pytest.fixture
def board(monkeypatch, tmp_path):
    """A board with the stand-ins for TensorRT and CUDA and an empty engine cache.

    -> a function that sets how the stand-ins behave from now on."""
    monkeypatch.syspath_prepend(str(STANDINS))
    monkeypatch.setenv("PYTHONPATH", str(STANDINS), prepend=":")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("smolvla_edge.runtime.engines.backend._loads", lambda _: True)

    def behave(**said):
        monkeypatch.setenv("STANDIN", json.dumps(said))
        forget()

    def forget():
        for name in [n for n in sys.modules if n.split(".")[0] in ("tensorrt", "cuda")]:
            del sys.modules[name]

    forget()
    yield behave
    forget()
