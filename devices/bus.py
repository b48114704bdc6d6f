"""The serial bus of Feetech servos: one transaction at a time, answers matched to what was asked.

The input is emptied before every request, the line is left to fall silent after every failed one, and an
answer counts only with the right id, length and checksum: a late answer is never taken for the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from . import frames
from .errors import ArmError, BusError
from .port import Port
from .sts3215 import Register, decode, encode, registers_between, write_problem

# Longest turnaround of a servo: Return_Delay_Time 254 x 2 us.
TURNAROUND_S = 0.00051
SILENCE_S = 0.005
DRAIN_LIMIT_S = 0.060
# How long after a missing answer it is still reckoned with; a hiccup of 90 ms has been seen.
LATE_WINDOW_S = 0.2
ECHO_PROBE_ID = 0xFD


@dataclass(frozen=True)
class StatusReply:
    """Answer to a ping. `answers` above 1 means that several servos share the id."""

    id: int
    error: int
    answers: int


@dataclass(frozen=True)
class Reading:
    """One register, sign applied, and the ERROR byte that came with it."""

    value: int
    error: int


@dataclass(frozen=True)
class BlockReading:
    """Neighbouring registers of one servo, signs applied, and the ERROR byte that came with them."""

    values: Mapping[Register, int]
    error: int


@dataclass
class BusCounters:
    """Anomalies since the port was opened. A healthy bus keeps all of them at 0."""

    timeouts: int = 0
    bad_checksums: int = 0
    stray_bytes: int = 0
    foreign_frames: int = 0
    repeated_frames: int = 0
    retries: int = 0
    drains: int = 0
    unacknowledged_writes: int = 0


class FeetechBus:
    """A bus of STS servos on `port`.

    reply_margin_s: how long an answer may be late beyond wire time and servo turnaround, 2 to 50 ms.
    retries: how often a request without answer is repeated.
    Methods raise BusError when servos do not answer, BusLost when the port is gone, ArmError for a write that
    this package never performs. Error bits of a servo are data: they are returned beside the value.
    """

    def __init__(
        self,
        port: str,
        baudrate: int = 1_000_000,
        *,
        reply_margin_s: float = 0.008,
        write_timeout_s: float = 0.1,
        retries: int = 1,
    ) -> None:
        problems = []
        if not 0.002 <= reply_margin_s <= 0.05:
            problems.append(f"reply_margin_s is {reply_margin_s}, expected 0.002 to 0.05")
        if not write_timeout_s > 0:
            problems.append(f"write_timeout_s is {write_timeout_s}, expected more than 0")
        if retries < 0:
            problems.append(f"retries is {retries}, expected 0 or more")
        if problems:
            raise BusError(f"cannot set up the bus on {port}: {'; '.join(problems)}.")
        self.path = port
        self.baudrate = baudrate
        self.counters = BusCounters()
        self.echo = False
        self._reply_margin_s = reply_margin_s
        self._write_timeout_s = write_timeout_s
        self._retries = retries
        self._byte_s = 10 / baudrate  # 8N1: ten bits
        self._port: Port | None = None
        self._disturbed = False
        self._late_until = 0.0
        self._lock = threading.RLock()

    def __enter__(self) -> FeetechBus:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        return self._port is not None

    def open(self) -> None:
        """Open the port for this process alone and find out whether the adapter echoes what is sent."""
        with self._lock:
            if self._port is not None:
                return
            self._port = Port(self.path, self.baudrate, self._write_timeout_s)
            self.counters = BusCounters()
            try:
                self._drain(self._port)
                self.echo = self._hears_itself(self._port)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the port. May be called again, and after the port is lost."""
        with self._lock:
            port, self._port = self._port, None
            if port is not None:
                port.close()

    def ping(self, servo_id: int) -> StatusReply | None:
        """The servo's answer, or None."""
        with self._lock:
            reply = self._answers(frames.ping(servo_id), {servo_id: 0}).get(servo_id)
            if reply is None:
                return None
            more = frames.status_parser().feed(self._drain(self._open_port()))
            return StatusReply(servo_id, reply.code, 1 + sum(frame.id == servo_id for frame in more))

    def read(self, servo_id: int, register: Register) -> Reading:
        block = self.read_block(servo_id, register, register)
        return Reading(block.values[register], block.error)

    def read_block(self, servo_id: int, first: Register, last: Register) -> BlockReading:
        """All registers from `first` to `last` of one servo in one answer."""
        size = last.end - first.address
        reply = self._answers(frames.read(servo_id, first.address, size), {servo_id: size}).get(servo_id)
        if reply is None:
            raise BusError(
                f"servo {servo_id} on {self.path} did not answer a read of {first}, "
                f"asked {1 + self._retries} times. Check its cable and power."
            )
        return _block(first, last, reply)

    def write(self, servo_id: int, register: Register, value: int) -> int:
        """Write and have it confirmed: by the servo's acknowledgement or, without one, by reading back.

        Returns the ERROR byte of the confirmation.
        """
        data = self._checked(register, value)
        request = frames.write(servo_id, register.address, data)
        with self._lock:
            ack = self._exchange(request, {servo_id: 0}).get(servo_id)
            if ack is not None:
                return ack.code
            # Response_Status_Level 0 never acknowledges, and an acknowledgement can be lost.
            for attempt in range(1 + self._retries):
                reading = self.read(servo_id, register)
                if reading.value == value:
                    self.counters.unacknowledged_writes += 1
                    return reading.error
                if attempt < self._retries:
                    self.counters.retries += 1
                    ack = self._exchange(request, {servo_id: 0}).get(servo_id)
                    if ack is not None:
                        return ack.code
        raise BusError(
            f"servo {servo_id} on {self.path} did not take {register} = {value}: "
            f"it still reads {reading.value}. Check the servo."
        )

    def sync_read(self, ids: Sequence[int], first: Register, last: Register | None = None) -> dict[int, BlockReading]:
        """Registers `first` to `last` of every servo in one request; the missing ones are asked again singly.

        A servo that never answers is absent from the result.
        """
        last = last or first
        size = last.end - first.address
        with self._lock:
            replies = self._exchange(frames.sync_read(first.address, size, ids), dict.fromkeys(ids, size))
            for servo_id in ids:
                for _ in range(self._retries):
                    if servo_id not in replies:
                        self.counters.retries += 1
                        request = frames.read(servo_id, first.address, size)
                        replies |= self._exchange(request, {servo_id: size})
        return {servo_id: _block(first, last, replies[servo_id]) for servo_id in ids if servo_id in replies}

    def sync_write(self, register: Register, values: Mapping[int, int]) -> None:
        """One register of several servos, {id: value}. The protocol has no acknowledgement for this."""
        data = {servo_id: self._checked(register, value) for servo_id, value in values.items()}
        self._exchange(frames.sync_write(register.address, data), {})

    def broadcast_torque_off(self) -> None:
        """Switch every servo on the bus off in one frame, which is never acknowledged."""
        register = Register.TORQUE_ENABLE
        self._exchange(frames.write(frames.BROADCAST_ID, register.address, encode(register, 0)), {})

    def _checked(self, register: Register, value: int) -> bytes:
        problem = write_problem(register, value)
        if problem:
            raise ArmError(f"refused to write on {self.path}: {problem}.")
        return encode(register, value)

    def _answers(self, request: bytes, expected: Mapping[int, int]) -> dict[int, frames.Frame]:
        with self._lock:
            for attempt in range(1 + self._retries):
                self.counters.retries += attempt > 0
                replies = self._exchange(request, expected)
                if replies:
                    break
        return replies

    def _exchange(self, request: bytes, expected: Mapping[int, int]) -> dict[int, frames.Frame]:
        """Send, then collect an answer per id in `expected`, {id: bytes of params}; missing ones stay out."""
        with self._lock:
            port = self._open_port()
            if self._disturbed:
                self._drain(port)
            self.counters.stray_bytes += port.discard_input()
            # Until all is collected: an interrupt here must not leave an answer to the next request.
            self._disturbed = True
            port.write(request)
            parser = frames.status_parser()
            replies: dict[int, frames.Frame] = {}
            echo_bytes = len(request) if self.echo else 0
            deadline = time.monotonic() + len(request) * self._byte_s + self._allowance_s(expected)
            while True:
                if echo_bytes or len(replies) < len(expected):
                    chunk = port.receive(deadline)
                elif expected and time.monotonic() < self._late_until:
                    # What came may be a late answer to an earlier request; this one's would follow it.
                    chunk = port.receive(time.monotonic() + SILENCE_S)
                else:
                    break
                if not chunk:
                    break
                echo_bytes, chunk = max(0, echo_bytes - len(chunk)), chunk[echo_bytes:]
                for frame in parser.feed(chunk):
                    if expected.get(frame.id) != len(frame.params):
                        self.counters.foreign_frames += 1
                        continue
                    # A servo answers in order: the later of two answers is the one to this request.
                    self.counters.repeated_frames += frame.id in replies
                    replies[frame.id] = frame
                    deadline = time.monotonic() + self._allowance_s(expected)
            missing = len(expected) - len(replies)
            if missing:
                self._late_until = time.monotonic() + LATE_WINDOW_S
            self.counters.timeouts += missing
            self.counters.bad_checksums += parser.bad_checksums
            self.counters.stray_bytes += parser.discarded_bytes
            self._disturbed = bool(missing or parser.discarded_bytes or parser.pending_bytes)
            return replies

    def _open_port(self) -> Port:
        if self._port is None:
            raise BusError(f"the bus on {self.path} is not open. Call open() first.")
        return self._port

    def _allowance_s(self, expected: Mapping[int, int]) -> float:
        longest = max(expected.values(), default=0) + frames.OVERHEAD
        return longest * self._byte_s + TURNAROUND_S + self._reply_margin_s

    def _drain(self, port: Port) -> bytes:
        """Read until the line has been silent for a while; returns what came."""
        drained = b""
        limit = time.monotonic() + DRAIN_LIMIT_S
        while time.monotonic() < limit and (chunk := port.receive(time.monotonic() + SILENCE_S)):
            drained += chunk
        self.counters.drains += 1
        self.counters.stray_bytes += len(drained)
        self._disturbed = False
        return drained

    def _hears_itself(self, port: Port) -> bool:
        # A sync read is broadcast: its echo is never a status frame. No servo has the id it asks for.
        register = Register.PRESENT_POSITION
        request = frames.sync_read(register.address, register.size, [ECHO_PROBE_ID])
        port.write(request)
        heard = b""
        deadline = time.monotonic() + len(request) * self._byte_s + self._reply_margin_s
        while len(heard) < len(request) and (chunk := port.receive(deadline)):
            heard += chunk
        return heard.startswith(request)


def _block(first: Register, last: Register, reply: frames.Frame) -> BlockReading:
    values = {
        register: decode(register, reply.params[register.address - first.address : register.end - first.address])
        for register in registers_between(first, last)
    }
    return BlockReading(values, reply.code)
