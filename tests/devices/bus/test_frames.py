"""The protocol, byte for byte: every golden packet, every malformed stream, and arbitrary bytes."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvla_edge.core.errors import BusError
from smolvla_edge.devices.bus import frames
from smolvla_edge.devices.bus.sts3215 import Register, decode, encode
from support.paths import DATA

GOLDEN = json.loads((DATA / "golden_packets.json").read_text())
INSTRUCTIONS = [p for p in GOLDEN["packets"] if p["kind"] == "instruction"]
STATUSES = [p for p in GOLDEN["packets"] if p["kind"] == "status"]
MALFORMED = {s["name"]: bytes.fromhex(s["hex"]) for s in GOLDEN["malformed_streams"]}

# A busy machine is slow, which is no finding.
thousand = settings(max_examples=1000, deadline=None)

status_frames = st.builds(
    frames.build,
    st.integers(0, frames.MAX_ID),
    st.integers(0, 0x7F),
    st.binary(max_size=frames.MAX_LENGTH - 2),
)


def names(packet: dict) -> str:
    return packet["name"]


def register_at(address: int) -> Register:
    return next(register for register in Register if register.address == address)


def build(packet: dict) -> bytes:
    servo_id, address = packet["id"], packet.get("address")
    match packet["instruction"]:
        case "PING":
            return frames.ping(servo_id)
        case "READ":
            return frames.read(servo_id, address, packet["length"])
        case "WRITE":
            valued = "value" in packet
            data = (
                encode(register_at(address), packet["value"]) if valued else bytes(packet["data"])
            )
            return frames.write(servo_id, address, data)
        case "SYNC_READ":
            return frames.sync_read(address, packet["length"], packet["ids"])
        case "SYNC_WRITE":
            if "per_servo" in packet:
                data = {int(i): bytes(d) for i, d in packet["per_servo"].items()}
            else:
                register = register_at(address)
                data = {int(i): encode(register, v) for i, v in packet["per_servo_value"].items()}
            return frames.sync_write(address, data)
    raise AssertionError(packet)


NEVER_BUILT = {"RESET", "REG_WRITE", "ACTION"}


@pytest.mark.parametrize(
    "packet", [p for p in INSTRUCTIONS if p["instruction"] not in NEVER_BUILT], ids=names
)
def test_every_golden_instruction_is_built_byte_for_byte(packet):
    assert build(packet) == bytes.fromhex(packet["hex"])


@pytest.mark.parametrize("packet", INSTRUCTIONS, ids=names)
def test_every_golden_instruction_is_read_back_by_the_instruction_parser(packet):
    wire = bytes.fromhex(packet["hex"])
    [frame] = frames.instruction_parser().feed(wire)
    assert frames.build(frame.id, frame.code, frame.params) == wire


def test_there_is_no_reset_instruction():
    assert 0x06 not in {int(instruction) for instruction in frames.Instruction}


@pytest.mark.parametrize("packet", STATUSES, ids=names)
def test_every_golden_status_is_parsed_with_its_error_bits_and_value(packet):
    [frame] = frames.status_parser().feed(bytes.fromhex(packet["hex"]))
    assert (frame.id, frame.code) == (packet["id"], packet["error"])
    if "params" in packet:
        assert list(frame.params) == packet["params"]
    if "value" in packet:
        is_load = packet["name"].startswith("status load")
        register = Register.PRESENT_LOAD if is_load else Register.PRESENT_POSITION
        assert decode(register, frame.params) == packet["value"]
    if "raw" in packet:
        assert int.from_bytes(frame.params, "little") == packet["raw"]
    if "decoded" in packet:
        expected = packet["decoded"]
        position, velocity, load = (
            decode(register, frame.params[register.address - 56 : register.end - 56])
            for register in (
                Register.PRESENT_POSITION,
                Register.PRESENT_VELOCITY,
                Register.PRESENT_LOAD,
            )
        )
        assert (position, velocity, load) == (
            expected["position"],
            expected["velocity"],
            expected["load"],
        )
        assert (frame.params[6] / 10, frame.params[7]) == (
            expected["voltage_V"],
            expected["temperature_C"],
        )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bad checksum reply", []),
        ("truncated reply", []),
        ("length too long", []),
        ("leading noise then good", [(1, 1304)]),
        ("extra FF then good", [(1, 1304)]),
        # The echo is a valid status frame to any parser; the bus strips it before.
        ("own echo then reply", [(1, 568), (1, 1304)]),
        ("reply from other id first", [(2, 2048), (1, 1304)]),
        ("header-like payload (65535)", [(1, 65535)]),
        ("all zeros", []),
        ("all FF", []),
    ],
)
def test_every_malformed_stream_gives_right_values_or_none(name, values):
    found = frames.status_parser().feed(MALFORMED[name])
    assert [(frame.id, int.from_bytes(frame.params, "little")) for frame in found] == values


def test_the_malformed_streams_of_the_table_are_all_checked():
    [mark] = test_every_malformed_stream_gives_right_values_or_none.pytestmark
    assert {name for name, _ in mark.args[1]} == set(MALFORMED)


def test_anomalies_are_counted():
    parser = frames.status_parser()
    parser.feed(MALFORMED["bad checksum reply"])
    assert parser.bad_checksums == 1
    assert parser.discarded_bytes == len(MALFORMED["bad checksum reply"])
    parser = frames.status_parser()
    parser.feed(MALFORMED["truncated reply"])
    assert parser.pending_bytes == len(MALFORMED["truncated reply"])


def test_a_good_frame_behind_a_bad_checksum_is_found():
    stream = MALFORMED["bad checksum reply"] + frames.build(1, 0, b"\x00\x08")
    assert frames.status_parser().feed(stream) == [frames.Frame(1, 0, b"\x00\x08")]


def test_a_good_frame_that_begins_inside_a_broken_one_is_found():
    stream = MALFORMED["truncated reply"] + frames.build(1, 0, b"\x00\x08")
    assert frames.status_parser().feed(stream) == [frames.Frame(1, 0, b"\x00\x08")]


@pytest.mark.parametrize(
    "impossible",
    [
        MALFORMED["length too long"],
        b"\xff\xff\x01\x01\x00",
        b"\xff\xff\xfe\x30\x00",
        b"\xff\xff\x01\x30\x80",
    ],
    ids=["too long", "too short", "id above 253", "error above 7F"],
)
def test_a_good_frame_behind_an_impossible_head_is_found_at_once(impossible):
    stream = impossible + frames.build(1, 0, b"\x00\x08")
    assert frames.status_parser().feed(stream) == [frames.Frame(1, 0, b"\x00\x08")]


@thousand
@given(st.binary(max_size=600), st.lists(st.integers(0, 600), max_size=8))
def test_the_parser_ends_and_gives_the_same_frames_however_the_bytes_are_cut(stream, cuts):
    whole = frames.status_parser().feed(stream)
    parser = frames.status_parser()
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parts = [f for a, b in pairwise(edges) for f in parser.feed(stream[a:b])]
    assert parts == whole
    sent = sum(len(f.params) + frames.OVERHEAD for f in whole)
    assert sent + parser.discarded_bytes + parser.pending_bytes == len(stream)


@thousand
@given(st.lists(st.one_of(status_frames, st.binary(max_size=20)), max_size=8))
def test_every_frame_found_lies_in_the_stream_with_a_right_checksum(parts):
    stream = b"".join(parts)
    for frame in frames.status_parser().feed(stream):
        assert frames.build(frame.id, frame.code, frame.params) in stream


@thousand
@given(
    st.lists(
        st.tuples(st.binary(max_size=20).map(lambda b: b.replace(b"\xff", b"")), status_frames)
    )
)
def test_noise_without_a_header_byte_never_hides_a_frame(parts):
    parser = frames.status_parser()
    found = parser.feed(b"".join(noise + frame for noise, frame in parts))
    assert [frames.build(f.id, f.code, f.params) for f in found] == [frame for _, frame in parts]
    assert parser.bad_checksums == 0


def check_one_damaged_byte(sent, at, value):
    """A reply of which one byte arrived wrong, read as the bus reads it: by id and size, from an
    empty buffer."""
    damaged = bytearray(frames.build(sent.id, sent.code, sent.params))
    damaged[at % len(damaged)] = value
    for found in frames.status_parser().feed(bytes(damaged)):
        if (found.id, len(found.params)) == (sent.id, len(sent.params)):
            assert found == sent


@thousand
@given(
    st.builds(
        frames.Frame, st.integers(0, frames.MAX_ID), st.integers(0, 0x7F), st.binary(max_size=60)
    ),
    st.integers(0, 65),
    st.integers(0, 255),
)
def test_a_reply_with_one_wrong_byte_is_never_another_value(sent, at, value):
    check_one_damaged_byte(sent, at, value)


def check_stream(rng):
    """A stream of replies, noise, cuts and damage, cut anywhere: what is found is there, whole, in
    order."""
    parts = []
    for _ in range(rng.randrange(4)):
        part = bytearray(
            frames.build(rng.randrange(254), rng.randrange(128), rng.randbytes(rng.randrange(20)))
        )
        kind = rng.randrange(8)
        if kind == 0:
            part = bytearray(rng.choice((b"\xff", b"\xff\xff", rng.randbytes(9))))
        elif kind == 1:
            del part[rng.randrange(len(part)) :]
        elif kind == 2:
            part[rng.randrange(len(part))] = rng.randrange(256)
        parts.append(bytes(part))
    stream = b"".join(parts)
    parser = frames.status_parser()
    cut = rng.randrange(len(stream) + 1)
    found = parser.feed(stream[:cut]) + parser.feed(stream[cut:])
    at = 0
    for frame in found:
        whole = frames.build(frame.id, frame.code, frame.params)
        at = stream.index(whole, at) + len(whole)
    sent = sum(len(frame.params) + frames.OVERHEAD for frame in found)
    assert sent + parser.discarded_bytes + parser.pending_bytes == len(stream)


@pytest.mark.parametrize("count", [5_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_any_stream_gives_frames_that_were_in_it_and_loses_no_byte(count):
    rng = random.Random(count)
    for _ in range(count):
        check_stream(rng)
        sent = frames.Frame(
            rng.randrange(254), rng.randrange(128), rng.randbytes(rng.randrange(20))
        )
        check_one_damaged_byte(sent, rng.randrange(26), rng.randrange(256))


@pytest.mark.parametrize(
    "make",
    [
        lambda: frames.ping(255),
        lambda: frames.ping(-1),
        lambda: frames.write(1, 0, bytes(248)),
    ],
)
def test_a_frame_that_cannot_be_on_the_wire_is_refused(make):
    with pytest.raises(BusError):
        make()
