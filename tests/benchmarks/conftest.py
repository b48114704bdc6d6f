"""smolvla-bench as the tests run it."""

import pytest
from typer.testing import CliRunner


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs a command line in an empty folder; -> its output, or raises what it raised."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        from smolvla_edge.benchmarks.cli import app

        done = CliRunner().invoke(app, [str(w) for w in words])
        if done.exit_code:
            raise done.exception
        return done.output

    return run


@pytest.fixture
def few_seeds(tmp_path):
    """A gate with four noises per observation instead of 16."""
    path = tmp_path / "seeds.toml"
    path.write_text("seeds = 4\n")
    return path
