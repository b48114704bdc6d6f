"""The serial bus of Feetech servos: one owner thread, one transaction at a time.

Before every request, the input is emptied. After every failed request, the bus waits until the line
is silent. An answer counts only with the right id, length and checksum. The protocol has no
sequence numbers, so after a missing answer the next request to that servo asks for one byte more:
the late answer then has the wrong length.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ...core.errors import ArmError, BusError
from . import frames
from .port import Port
from .sts3215 import Register, decode, encode, registers_between, write_problem

# Longest turnaround of a servo: Return_Delay_Time 254 x 2 us.
TURNAROUND_S = 0.00051
SILENCE_S = 0.005
DRAIN_LIMIT_S = 0.060
BYTE_S = 10 / 1_000_000  # 8N1: ten bits
RETRIES = 1
# How long a late answer is expected. A delay of 90 ms has been seen.
LATE_WINDOW_S = 0.2
# Number of different lengths: more than a dead servo uses within the window at 30 Hz.
SPARE_LENGTHS = 16
DESYNCS_LIMIT = 10
DESYNCS_WINDOW_S = 1.0
ECHO_PROBE_ID = 0xFD
# Counters of bytes that were no answer. A servo that is only silent does not count.
DISTURBANCES = ("bad_checksums", "stray_bytes", "foreign_frames", "repeated_frames")


class Reading(NamedTuple):
    """One register, sign applied, and the ERROR byte that came with it."""

    value: int
    error: int


class BlockReading(NamedTuple):
    """Consecutive registers of one servo, signs applied, and the ERROR byte of the answer."""

    values: Mapping[Register, int]
    error: int


class FeetechBus:
    """A bus of STS servos on `port`. Only the thread that opens it may use it; any may close it.

    reply_margin_s: how late an answer may be, beyond wire time and servo turnaround. reply_gap_s:
    how much later the next answer to a sync read may be than the one before; if the first answer
    took longer, twice its time, up to the margin. fd: the port, opened by another process; its
    unsent bytes are discarded. counters: errors on the line since the port was opened, by name.
    on_write: called with (id, register, value) before each register write, with id 254 for all
    servos; sync writes, the goals of every tick, are not reported.

    Methods raise BusError if servos do not answer, or if more than DESYNCS_LIMIT exchanges in a
    second were disturbed; BusLost when the port is gone; ArmError for a write that this package
    never performs, and for a call from another thread. Error bits of a servo are data: they are
    returned with the value.
    """

    def __init__(
        self,
        port: str,
        *,
        reply_margin_s: float = 0.008,
        reply_gap_s: float = 0.003,
        fd: int | None = None,
    ) -> None:
        self.path, self._fd = port, fd
        self.counters = Counter[str]()
        self.echo = False
        self.on_write: Callable[[int, Register, int], None] = lambda *_: None
        self._reply_margin_s, self._reply_gap_s = reply_margin_s, reply_gap_s
        self._port: Port | None = None
        self._owner = threading.current_thread()
        self._disturbed = False
        self._busy_s = 0.0  # monotonic: when the last byte was on the line
        self._late_until_s: dict[
            int, float
        ] = {}  # id -> until when an answer to an earlier request may come
        self._spare = 0
        self._desyncs_s: list[float] = []

    def __enter__(self) -> FeetechBus:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        return self._port is not None

    def open(self) -> None:
        """Open the port for this process alone. Find out whether the adapter echoes requests."""
        self._owner = threading.current_thread()
        self._port = port = Port(self.path, self._fd)
        self._late_until_s, self._desyncs_s, self._busy_s = {}, [], time.monotonic()
        try:
            if self._fd is not None:
                port.flush()
            self._drain(port)
            self.echo = self._hears_itself(port)
            self.counters.clear()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the port. Can be called again, by any thread, and after the port is lost."""
        port, self._port = self._port, None
        if port is not None:
            port.close()

    def fileno(self) -> int:
        """File descriptor of the open port, for the guardian to inherit."""
        return self._open_port().fileno()

    def ping(self, servo_id: int) -> tuple[int, int] | None:
        """ERROR byte and number of answers (2 servos share the id); None without an answer."""
        for _ in self._tries():
            late = self._may_answer_late(servo_id)
            repeated = self.counters["repeated_frames"]
            reply = self._exchange(frames.ping(servo_id), {servo_id: 0}).get(servo_id)
            if reply is not None:
                more = frames.status_parser().feed(self._drain(self._open_port()))
                twins = (
                    self.counters["repeated_frames"]
                    - repeated
                    + sum(frame.id == servo_id for frame in more)
                )
                # After a late answer, a second answer is not a second servo.
                return reply.code, 1 if late else 1 + twins
        return None

    def read(self, servo_id: int, register: Register) -> Reading:
        block = self.read_block(servo_id, register, register)
        return Reading(block.values[register], block.error)

    def read_block(self, servo_id: int, first: Register, last: Register) -> BlockReading:
        """All registers from `first` to `last` of one servo in one answer."""
        for _ in self._tries():
            for reply in self._ask(servo_id, first, last).values():
                return _block(first, last, reply)
        raise BusError(
            f"servo {servo_id} on {self.path} did not answer a read of {first}. "
            "Check cable and power."
        )

    def write(self, servo_id: int, register: Register, value: int) -> int:
        """Write, and confirm it by the servo's acknowledgement or by reading back.

        Returns the ERROR byte of the confirmation.
        """
        request = frames.write(servo_id, register.address, self._checked(register, value))
        for _ in self._tries():
            self.on_write(servo_id, register, value)
            late = self._may_answer_late(servo_id)
            ack = self._exchange(request, {servo_id: 0}).get(servo_id)
            if ack is not None and not late:
                return ack.code
            # With Response_Status_Level 0 there is no acknowledgement. It can also be lost, or be
            # an older one.
            reading = self.read(servo_id, register)
            if reading.value == value:
                self.counters["unacknowledged_writes"] += 1
                return reading.error
        raise BusError(
            f"servo {servo_id} on {self.path} did not take {register} = {value}, "
            f"it reads {reading.value}"
        )

    def sync_read(
        self,
        ids: Sequence[int],
        first: Register,
        last: Register | None = None,
        budget_s: float = math.inf,
    ) -> dict[int, BlockReading]:
        """Read registers `first` to `last` of every servo in one request.

        Missing servos are asked again one by one, until `budget_s` after the call. A servo that
        never answers is absent from the result.
        """
        until_s = time.monotonic() + budget_s
        last = last or first
        size = self._size(ids, first, last)
        replies = self._exchange(
            frames.sync_read(first.address, size, ids), dict.fromkeys(ids, size)
        )
        for _ in range(RETRIES):
            for servo_id in [i for i in ids if i not in replies]:
                if time.monotonic() < until_s:
                    self.counters["retries"] += 1
                    replies |= self._ask(servo_id, first, last, until_s)
        return {
            servo_id: _block(first, last, replies[servo_id])
            for servo_id in ids
            if servo_id in replies
        }

    def sync_write(self, register: Register, values: Mapping[int, int]) -> None:
        """Write one register of several servos, {id: value}. It is never acknowledged."""
        self.sync_write_block({i: {register: value} for i, value in values.items()})

    def sync_write_block(self, values: Mapping[int, Mapping[Register, int]]) -> None:
        """Write the same consecutive registers of several servos in one frame, never acknowledged.

        values: {id: {register: value}}.
        """
        data = {
            i: b"".join(self._checked(r, value) for r, value in given.items())
            for i, given in values.items()
        }
        block, *others = {tuple(given) for given in values.values()}
        if others or any(one.end != next_.address for one, next_ in pairwise(block)):
            raise ArmError(f"cannot write {', '.join(map(str, block))} of each servo as one block.")
        self._exchange(frames.sync_write(block[0].address, data), {})

    def broadcast_torque_off(self) -> None:
        """Switch every servo on the bus off in one frame, which is never acknowledged."""
        register = Register.TORQUE_ENABLE
        self.on_write(frames.BROADCAST_ID, register, 0)
        self._exchange(frames.write(frames.BROADCAST_ID, register.address, encode(register, 0)), {})

    def _tries(self) -> Iterator[None]:
        yield
        for _ in range(RETRIES):
            self.counters["retries"] += 1
            yield

    def _checked(self, register: Register, value: int) -> bytes:
        if problem := write_problem(register, value):
            raise ArmError(f"refused to write on {self.path}: {problem}.")
        return encode(register, value)

    def _ask(
        self, servo_id: int, first: Register, last: Register, until_s: float = math.inf
    ) -> dict[int, frames.Frame]:
        """One read of one servo, not repeated; empty without an answer."""
        size = self._size((servo_id,), first, last)
        return self._exchange(frames.read(servo_id, first.address, size), {servo_id: size}, until_s)

    def _exchange(
        self, request: bytes, expected: Mapping[int, int], until_s: float = math.inf
    ) -> dict[int, frames.Frame]:
        """Send, then collect one answer per id. expected: {id: bytes of params}.

        Ids that do not answer are absent.
        """
        port = self._open_port()
        before = self._disturbances()
        if self._disturbed or port.waiting():
            self._drain(port, until_s)
        # Stays true after an interrupt: no answer may be left for the next request.
        self._disturbed = True
        sent_s = now_s = time.monotonic()
        if sent_s >= until_s:
            return {}
        port.write(request)
        self._busy_s = sent_s + len(request) * BYTE_S
        parser = frames.status_parser()
        replies: dict[int, frames.Frame] = {}
        echo_bytes = len(request) if self.echo else 0
        answer_s = (max(expected.values(), default=0) + frames.OVERHEAD) * BYTE_S
        wait_s = TURNAROUND_S + self._reply_margin_s
        deadline = min(until_s, self._busy_s + answer_s + wait_s)
        while echo_bytes or len(replies) < len(expected):
            chunk = port.receive(deadline)
            now_s = time.monotonic()
            echo_bytes, answer = max(0, echo_bytes - len(chunk)), chunk[echo_bytes:]
            for frame in parser.feed(answer):
                if expected.get(frame.id) != len(frame.params):
                    self.counters["foreign_frames"] += 1
                    continue
                if not replies:
                    wait_s = max(self._reply_gap_s, min(self._reply_margin_s, 2 * (now_s - sent_s)))
                # A servo answers in order: the later of two answers belongs to this request.
                self.counters["repeated_frames"] += frame.id in replies
                replies[frame.id] = frame
                deadline = min(until_s, now_s + answer_s + wait_s)
            if chunk:
                self._busy_s = now_s
            # Bytes that had arrived count even if we are late. Endless noise is left.
            if not chunk or now_s > deadline:
                break
        missing = expected.keys() - replies.keys()
        if missing:
            self._late_until_s |= dict.fromkeys(missing, sent_s + LATE_WINDOW_S)
            self._spare = self._spare % SPARE_LENGTHS + 1
        self.counters["timeouts"] += len(missing)
        self.counters["bad_checksums"] += parser.bad_checksums
        self.counters["stray_bytes"] += parser.discarded_bytes + parser.pending_bytes
        self._disturbed = bool(missing or parser.discarded_bytes or parser.pending_bytes)
        if self._disturbances() > before:
            self._desyncs_s = [s for s in self._desyncs_s if s > now_s - DESYNCS_WINDOW_S] + [now_s]
            if len(self._desyncs_s) > DESYNCS_LIMIT:
                # The next requests, above all switching off, get a new chance.
                self._desyncs_s = []
                raise BusError(
                    f"the line on {self.path} is too noisy: {dict(+self.counters)}. Check cable "
                    "and power, that no second program uses this bus, and that no two servos "
                    "share an id."
                )
        return replies

    def _disturbances(self) -> int:
        return sum(self.counters[name] for name in DISTURBANCES)

    def _may_answer_late(self, servo_id: int) -> bool:
        """Whether an answer to an earlier request may still come."""
        return self._late_until_s.get(servo_id, 0.0) > time.monotonic()

    def _size(self, ids: Sequence[int], first: Register, last: Register) -> int:
        """Bytes to read for `first` to `last`. No late answer can have this length."""
        spare = self._spare if any(map(self._may_answer_late, ids)) else 0
        return last.end - first.address + spare

    def _open_port(self) -> Port:
        if self._port is None:
            raise BusError(f"the bus on {self.path} is not open. Call open() first.")
        if threading.current_thread() is not self._owner:
            raise ArmError(
                f"the bus on {self.path} belongs to the thread that opened it, {self._owner.name}."
            )
        return self._port

    def _drain(self, port: Port, until_s: float = math.inf) -> bytes:
        """Read until the line has been silent for a while; returns what came."""
        drained = b""
        limit = min(until_s, time.monotonic() + DRAIN_LIMIT_S)
        while time.monotonic() < limit and (
            chunk := port.receive(min(limit, self._busy_s + SILENCE_S))
        ):
            self._busy_s = time.monotonic()
            drained += chunk
        self.counters["stray_bytes"] += len(drained)
        self._disturbed = False
        return drained

    def _hears_itself(self, port: Port) -> bool:
        # A sync read is a broadcast, so its echo is never a status frame. No servo has this id.
        register = Register.PRESENT_POSITION
        request = frames.sync_read(register.address, register.size, [ECHO_PROBE_ID])
        port.write(request)
        self._busy_s = time.monotonic() + len(request) * BYTE_S + self._reply_margin_s
        return self._drain(port).startswith(request)


def _block(first: Register, last: Register, reply: frames.Frame) -> BlockReading:
    values = {
        register: decode(
            register, reply.params[register.address - first.address : register.end - first.address]
        )
        for register in registers_between(first, last)
    }
    return BlockReading(values, reply.code)
