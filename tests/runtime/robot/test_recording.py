"""What a run leaves behind, and whether it can be computed again."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from smolvla_edge.runtime import CheckFailed, InputError, Policy, RealTimeChunking, SettingsError
from smolvla_edge.runtime.robot import run_log
from smolvla_edge.runtime.robot.recording import Recorder
from smolvla_edge.runtime.robot.replay import differences, read_recording, replay
from smolvla_edge.runtime.robot.run_log import QUEUE_LIMIT, RunLog
from support.paths import TESTS
from support.recordings import JOINTS, META, chunk, some_chunk


def wait_until(condition, limit_s=30.0):
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(folder, policy, shaped=lambda noise: noise):
    """Two chunks of `policy`, the second following the tail of the first; pictures of unequal
    size."""
    policy.rtc = META.rtc
    meta = dataclasses.replace(META, bundle_digest=policy.bundle.digest)
    recorder, rng, prev, delay = Recorder(folder, meta), np.random.default_rng(3), None, 0
    for steps in (10, 3):
        images = {
            "front": rng.integers(0, 256, (48, 64, 3), np.uint8),
            "wrist": rng.integers(0, 256, (31, 17, 3), np.uint8)[::-1],  # not contiguous
        }
        state, noise = rng.normal(size=6) * 30, shaped(policy.draw_noise())
        actions = policy.predict_chunk(images, state, meta.task, noise, steps, prev, delay)
        recorder.answered(chunk(images, state, noise, steps, prev, delay, actions, 1.0, 0.1))
        prev, delay = (actions[10:], 4) if np.isfinite(actions).all() else (None, 0)
    recorder.close()
    assert recorder.problem == ""
    return folder


def changed(bundle, change):
    """A policy from `bundle` after `change` of its manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return Policy.load(bundle, device="cpu", seed=1)


def statistics(manifest):
    return manifest["action"]["normalization"]["statistics"]


@pytest.fixture(scope="module")
def policy(export_case):
    return Policy.load(export_case("tiny", "fp32"), device="cpu", seed=1)


@pytest.fixture
def recorded(policy, tmp_path):
    return record(tmp_path / "run", policy)


def test_a_recorded_run_is_computed_again_bit_for_bit(recorded, export_case, capsys):
    fresh = Policy.load(export_case("tiny", "fp32"), device="cpu")
    assert [apart.tolist() for _, apart, _ in differences(read_recording(recorded), fresh)] == [
        [0.0] * 6
    ] * 2
    replay(recorded, fresh)
    out = capsys.readouterr().out
    assert all(joint in out for joint in JOINTS)
    assert out.endswith("replayed with the same bundle: at most 0.0e+00 from what was recorded\n")


def test_a_replay_uses_the_recorded_real_time_chunking(recorded, policy):
    policy.rtc = RealTimeChunking("zeros", execution_horizon=1)
    replay(recorded, policy)
    raw = json.loads((recorded / "run.json").read_text())
    raw["rtc"]["schedule"] = "linear"
    (recorded / "run.json").write_text(json.dumps(raw))
    with pytest.raises(CheckFailed, match="first in chunk 000001"):  # chunk 0 had no previous one
        replay(recorded, policy)


def edit_chunk(folder, number=1, **changes):
    path = folder / "chunks" / f"{number:06d}.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return arrays


def test_the_same_bundle_answering_something_else_fails_with_the_first_chunk_and_joint(
    recorded, policy, capsys
):
    actions = edit_chunk(recorded)["actions"].copy()
    scale = max(1.0, np.abs(actions).max())
    actions[7, 2] += 0.5e-4 * scale
    edit_chunk(recorded, actions=actions)
    replay(recorded, policy)  # within the tolerance
    actions[7, 2] += 1.5e-4 * scale
    edit_chunk(recorded, actions=actions)
    with pytest.raises(CheckFailed, match=r"chunk 000001 by .* in elbow_flex \(at most"):
        replay(recorded, policy)
    assert "replayed with the same bundle" in capsys.readouterr().out
    edit_chunk(recorded, 0, actions=np.zeros((50, 6), np.float32))
    with pytest.raises(CheckFailed, match="first in chunk 000000"):
        replay(recorded, policy)


def test_small_actions_are_judged_by_their_difference_alone(tiny_bundle, tmp_path):
    policy = changed(tiny_bundle, lambda m: statistics(m).update(mean=[0.0] * 6, std=[1e-3] * 6))
    folder = record(tmp_path / "run", policy)
    actions = edit_chunk(folder)["actions"]
    edit_chunk(folder, actions=actions + np.float32(0.9e-4))
    replay(folder, policy)
    edit_chunk(folder, actions=actions + np.float32(1.1e-4))
    with pytest.raises(CheckFailed):
        replay(folder, policy)


def test_an_answer_that_was_not_finite_is_reproduced_only_by_one_that_is_not(
    recorded, policy, tiny_bundle, tmp_path
):
    overflowing = changed(
        tiny_bundle, lambda m: statistics(m).update(mean=[0.0] * 6, std=[1.0] * 6)
    )
    loud = record(tmp_path / "loud", overflowing, lambda noise: np.sign(noise) * np.float32(3e38))
    assert np.isnan(edit_chunk(loud)["actions"]).any()
    replay(loud, overflowing)
    actions = edit_chunk(recorded)["actions"].copy()
    actions[0, 5] = np.nan
    edit_chunk(recorded, actions=actions)
    with pytest.raises(CheckFailed, match="by inf in gripper"):
        replay(recorded, policy)


def test_another_bundle_is_compared_and_not_judged(recorded, tiny_bundle, capsys):
    def shift(manifest):
        statistics(manifest)["mean"][1] += 2.5

    other = changed(tiny_bundle, shift)
    (_, apart, _), _ = differences(read_recording(recorded), other)
    assert apart == pytest.approx([0, 2.5, 0, 0, 0, 0], abs=1e-4)
    replay(recorded, other)
    out = capsys.readouterr().out
    assert re.search(r"\nshoulder_lift +2\.\de\+00  00000[01]\n", out)
    assert "another bundle (fp32 then, fp32 now): at most 2." in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cameras": ["front"]},
            r"its cameras are \['front'\], the bundle has \['front', 'wrist'\]",
        ),
        (
            {"joints": JOINTS[:5]},
            r"its joints are \('shoulder_pan', .*; its actions' dimensions are 5, the bundle has 6",
        ),
        (
            {"joints": JOINTS[::-1]},
            r"its joints are \('gripper', .*, the bundle has \('shoulder_pan', ",
        ),
        ({"units": "radians"}, "its units are radians, the bundle has degrees"),
    ],
)
def test_a_recording_of_another_robot_is_refused(recorded, tiny_bundle, change, message):
    policy = changed(tiny_bundle, lambda m: m.update(units="degrees", joints=JOINTS))
    raw = json.loads((recorded / "run.json").read_text())
    (recorded / "run.json").write_text(json.dumps(raw | change))
    with pytest.raises(InputError, match=message):
        replay(recorded, policy)


def test_a_recording_of_other_dimensions_is_refused(recorded, policy, export_case):
    edit_chunk(recorded, actions=np.zeros((50, 1), np.float32))
    with pytest.raises(
        InputError, match=r"actions of shape \(50, 1\), the bundle answers \(50, 6\)"
    ):
        replay(recorded, policy)
    edit_chunk(recorded, state=np.zeros(14))
    with pytest.raises(InputError, match="state has shape"):
        replay(recorded, policy)
    with pytest.raises(InputError, match="its actions' dimensions are 6, the bundle has 14"):
        replay(recorded, Policy.load(export_case("tiny_variant", "fp32"), device="cpu"))


def test_a_recording_that_names_no_joints_is_replayed_all_the_same(
    recorded, policy, tiny_bundle, capsys
):
    raw = json.loads((recorded / "run.json").read_text())
    (recorded / "run.json").write_text(json.dumps(raw | {"joints": []}))
    replay(recorded, policy)
    assert "joint 5 " in capsys.readouterr().out
    replay(recorded, changed(tiny_bundle, lambda m: m.update(joints=JOINTS)))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("run.json", lambda p: p.unlink(), "run.json cannot be read"),
        ("run.json", cut, "run.json cannot be read"),
        ("run.json", lambda p: p.write_text("[]"), "format and version None"),
        ("run.json", lambda p: p.write_text('{"format": "other", "version": 1}'), "'other', 1"),
        (
            "run.json",
            lambda p: p.write_text(p.read_text().replace('"version": 1', '"version": 2')),
            "-recording', 2",
        ),
        (
            "run.json",
            lambda p: p.write_text(p.read_text().replace('"fps"', '"Hz"')),
            "unknown field Hz; missing field",
        ),
        (
            "run.json",
            lambda p: p.write_text(p.read_text().replace("20", "0")),
            "execution_horizon is 0",
        ),
        ("chunks/000001.npz", cut, "000001.npz is damaged"),
        ("chunks/000001.npz", lambda p: p.write_bytes(b""), "000001.npz is damaged"),
        ("chunks/000001.npz", lambda p: np.savez(p, state=np.zeros(6)), "000001.npz is damaged"),
        (
            "chunks/000001.npz",
            lambda p: edit_chunk(p.parents[1], state=np.array([{}])),
            "000001.npz is damaged",
        ),
        ("chunks/000001.wrist.png", lambda p: p.unlink(), "000001.wrist.png is damaged"),
        ("chunks/000001.wrist.png", cut, "000001.wrist.png is damaged"),
        ("chunks/000001.wrist.png", lambda p: p.write_bytes(b""), "000001.wrist.png is damaged"),
    ],
)
def test_a_damaged_recording_is_refused_by_the_name_of_the_file(
    recorded, policy, name, damage, message
):
    damage(recorded / name)
    with pytest.raises(SettingsError, match=message):
        replay(recorded, policy)


def test_a_chunk_that_was_never_finished_is_not_replayed(recorded, policy, capsys):
    (recorded / "chunks" / "000001.npz").rename(recorded / "chunks" / "000001.npz.part")
    replay(recorded, policy)
    assert capsys.readouterr().out.startswith("1 chunks of")
    (recorded / "chunks" / "000000.npz").unlink()
    with pytest.raises(SettingsError, match="no finished chunk"):
        replay(recorded, policy)


def test_whatever_a_tick_holds_becomes_one_line_of_json(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    position = np.array([1.234567, np.nan])
    log.write(
        {
            "t": 123456.7890123,
            "position": position,
            "ok": True,
            "n": np.int64(3),
            "x": np.float32(0.1),
        }
    )
    position[:] = 7  # the loop may use its array again
    log.write(
        {
            "nan": float("nan"),
            "inf": -np.inf,
            "pair": (1, (None, "a\nb")),
            "of": {1: np.bool_(False)},
        }
    )
    log.write({"other": log.path, "long": np.longdouble(1.5)})
    log.close()
    assert lines(log.path) == [
        {"t": 123456.78901, "position": [1.23457, None], "ok": True, "n": 3, "x": 0.1},
        {"nan": None, "inf": None, "pair": [1, [None, "a\nb"]], "of": {"1": False}},
        {"other": str(log.path), "long": 1.5},
    ]
    log.close()
    log.write({"late": 1})  # nobody is there to write it, and nobody minds


def test_a_log_that_cannot_be_opened_is_refused_at_once(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "log.jsonl", tmp_path / "nul\0"):
        with pytest.raises(SettingsError, match="cannot write a log"):
            RunLog(path)


def test_only_a_new_folder_is_recorded_into(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="is not empty"):
        Recorder(tmp_path, META)
    with pytest.raises(SettingsError, match="cannot record into"):
        Recorder(tmp_path / "file", META)
    with pytest.raises(SettingsError, match="cannot record into"):
        Recorder(tmp_path / "file" / "run", META)
    (tmp_path / "empty").mkdir()
    Recorder(tmp_path / "empty", META).close()
    assert read_recording(tmp_path / "empty").meta == META


def test_a_full_disk_ends_a_log_with_one_line_and_raises_nothing(tmp_path, capsys):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path / "log.jsonl")
    log.write({"tick": 0})
    wait_until(lambda: log.problem)
    for i in range(2 * QUEUE_LIMIT):
        log.write({"tick": i})
    log.close()
    assert "No space left on device" in log.problem
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"the record in {tmp_path} is incomplete: " in err


LIMITED = """
import resource, sys, time
from pathlib import Path
import test_recording as t
recorder = t.Recorder(Path(sys.argv[1]), t.META)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
recorder.answered(t.some_chunk(0))
recorder.write({"tick": 1})
recorder.answered(t.some_chunk(1, **eval(sys.argv[2])))
t.wait_until(lambda: recorder.problem)
recorder.answered(t.some_chunk(2))
recorder.write({"tick": 2})
recorder.close()
print(recorder.problem)
"""


def run_python(code, *arguments, **options):
    path = [str(Path(__file__).parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        **options,
    )


@pytest.mark.parametrize("big", [{"height": 200, "width": 200}, {"rows": 2000}])
def test_what_was_recorded_before_the_disk_was_full_stays_readable(tmp_path, big):
    """A limit on the size of files stands in for the disk: the system refuses the write just so."""
    process = run_python(LIMITED, tmp_path / "run", big)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "File too large" in out
    assert err.count("warning: ") == 1, err
    stored = read_recording(tmp_path / "run")
    assert [f.name for f in stored.files] == ["000000.npz"]
    assert_equal(stored.chunk(stored.files[0]), some_chunk(0))
    assert lines(tmp_path / "run" / "ticks.jsonl") == [{"tick": 1}]


def assert_equal(a, b):
    x, y = a.request, b.request
    assert {n: i.tolist() for n, i in x.images.items()} == {
        n: i.tolist() for n, i in y.images.items()
    }
    for one, other in ((x.state, y.state), (a.noise, b.noise), (a.actions, b.actions)):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert (a.steps, a.latency_s, x.continuation, x.time_s) == (
        b.steps,
        b.latency_s,
        y.continuation,
        y.time_s,
    )


KILLED = """
import sys
from pathlib import Path
import test_recording as t
recorder = t.Recorder(Path(sys.argv[1]), t.META)
for i in range(10**6):
    recorder.write({"tick": i})
    recorder.answered(t.some_chunk(i))
"""


def test_what_was_recorded_before_a_kill_stays_readable(tmp_path):
    process = run_python(KILLED, tmp_path / "run")
    try:
        wait_until(
            lambda: (
                (tmp_path / "run" / "chunks" / "000004.npz").exists() or process.poll() is not None
            )
        )
    finally:
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
    stored = read_recording(tmp_path / "run")
    assert len(stored.files) >= 5, err
    assert list(stored.files) == sorted(stored.files)
    for file in stored.files:
        assert_equal(stored.chunk(file), some_chunk(int(file.stem)))
    whole = (tmp_path / "run" / "ticks.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line) for line in whole][:5] == [{"tick": i} for i in range(5)]


def test_a_folder_that_is_removed_ends_the_recording_and_not_the_run(tmp_path, capsys):
    recorder = Recorder(tmp_path / "run", META)
    (tmp_path / "run" / "chunks").rmdir()
    recorder.answered(some_chunk())
    recorder.write({"tick": 0})
    recorder.close()
    assert lines(tmp_path / "run" / "ticks.jsonl") == []
    assert f"chunks/.000000.front.png.{os.getpid()}.part: No such file" in recorder.problem
    assert capsys.readouterr().err.count("\n") == 1


def test_a_disk_that_is_too_slow_costs_lines_and_chunks_that_are_counted(tmp_path, capsys):
    """A pipe that nobody empties stands in for the disk, where the first chunk's first file
    goes."""
    recorder = Recorder(tmp_path / "run", META)
    pipe = tmp_path / "run" / "chunks" / f".000000.front.png.{os.getpid()}.part"
    os.mkfifo(pipe)
    recorder.answered(some_chunk(0))
    wait_until(lambda: recorder.worker.waiting == 0)  # the writer has it, and is stuck
    for i in range(QUEUE_LIMIT - 1):
        recorder.write({"tick": i})
    recorder.answered(some_chunk(1))
    assert (recorder.dropped, recorder.dropped_chunks) == (0, 0)
    for i in range(3):
        recorder.write({"tick": 1000 + i})
    for i in range(2):
        recorder.answered(some_chunk(2 + i))
    assert (recorder.dropped, recorder.dropped_chunks) == (3, 2)
    pipe.read_bytes()  # the disk answers again
    wait_until(lambda: recorder.worker.waiting == 0)
    recorder.answered(some_chunk(4))
    assert recorder.problem == ""
    recorder.close()
    assert (
        "is incomplete: the disk was too slow for 3 ticks and 2 chunks" in capsys.readouterr().err
    )
    assert [line["tick"] for line in lines(tmp_path / "run" / "ticks.jsonl")] == list(
        range(QUEUE_LIMIT - 1)
    )
    names = [f.stem for f in read_recording(tmp_path / "run").files]
    assert names == ["000000", "000001", "000004"]  # a gap is where chunks were lost


def test_a_disk_that_hangs_does_not_keep_the_run_from_ending(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_log, "CLOSE_LIMIT_S", 0.1)
    recorder = Recorder(tmp_path / "run", META)
    pipe = tmp_path / "run" / "chunks" / f".000000.front.png.{os.getpid()}.part"
    os.mkfifo(pipe)
    for i in range(2 * QUEUE_LIMIT):
        recorder.answered(some_chunk(0) if i == 0 else some_chunk(1))
    start = time.monotonic()
    recorder.close()
    recorder.close()
    assert time.monotonic() - start < 10
    assert "the disk has not answered for 0.1 s" in recorder.problem
    assert capsys.readouterr().err.count("incomplete") == 1
    pipe.read_bytes()  # lets the thread go
    assert recorder.worker.stop(30)
    recorder.close()


def test_the_logs_of_all_runs_stay_under_their_limit_and_the_oldest_go_first(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    runs = tmp_path / "smolvla-edge" / "runs"
    runs.mkdir(parents=True)
    (runs / "mine.jsonl").write_bytes(b"x" * 50_000)
    old = [runs / f"20260101T00000{i}.000000Z.jsonl" for i in range(5)]
    for path in old:
        path.write_bytes(b"x" * 20_000)
    log = RunLog.in_folder(100_000)
    assert [path.exists() for path in old] == [False, True, True, True, True]
    for i in range(500):
        while log.worker.waiting > QUEUE_LIMIT // 2:
            time.sleep(0.001)
        log.write({"tick": i, "filler": "x" * 1000})
    log.close()
    assert (runs / "mine.jsonl").exists()
    assert not any(path.exists() for path in old)
    parts = sorted(path for path in runs.iterdir() if path.name != "mine.jsonl")
    assert 80_000 < sum(path.stat().st_size for path in parts) <= 100_000
    kept = [line["tick"] for path in parts for line in lines(path)]
    assert kept == list(range(kept[0], 500))  # the newest, without a gap
    assert (log.problem, log.dropped) == ("", 0)
    assert capsys.readouterr().err.count("the log of this run reached 0.1 MB (--log-mb)") == 1


def test_a_home_that_cannot_be_written_costs_a_warning_and_no_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    log = RunLog.in_folder(10**8)
    log.write({"tick": 0})
    log.close()
    assert log.problem == ""
    assert "warning: this run leaves no log" in capsys.readouterr().err
