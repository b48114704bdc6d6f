"""Frames of the Feetech SCS/STS serial protocol ("protocol 0"): bytes in, bytes out, no port.

    instruction: FF FF | id | length | instruction | params | checksum
    status:      FF FF | id | length | error       | params | checksum

length = params + 2; checksum = ~(id + length + code + params) & 0xFF. Source: Feetech/Waveshare
"Communication Protocol User Manual" EN 191218-0923. No function here builds the factory reset
instruction (6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from ...core.errors import BusError

HEADER = b"\xff\xff"
MAX_ID = 0xFD
BROADCAST_ID = 0xFE
MIN_LENGTH, MAX_LENGTH = 2, 250
# Header, id, length, code and checksum around the params.
OVERHEAD = 6


class Instruction(IntEnum):
    PING = 0x01
    READ = 0x02
    WRITE = 0x03
    SYNC_READ = 0x82
    SYNC_WRITE = 0x83


@dataclass(frozen=True)
class Frame:
    """One valid frame. `code` is the error byte of a status frame, or the instruction."""

    id: int
    code: int
    params: bytes


def checksum(body: bytes | bytearray) -> int:
    """Checksum over everything between the header and the checksum itself."""
    return ~sum(body) & 0xFF


def build(servo_id: int, code: int, params: bytes = b"") -> bytes:
    """A whole frame; BusError when id, code or length cannot be on the wire."""
    length = len(params) + 2
    if not (0 <= servo_id <= BROADCAST_ID and 0 <= code <= 0xFF and length <= MAX_LENGTH):
        raise BusError(
            f"cannot build a frame with id {servo_id}, code {code} and {len(params)} params."
        )
    body = bytes((servo_id, length, code)) + params
    return HEADER + body + bytes((checksum(body),))


def ping(servo_id: int) -> bytes:
    return build(servo_id, Instruction.PING)


def read(servo_id: int, address: int, size: int) -> bytes:
    return build(servo_id, Instruction.READ, bytes((address, size)))


def write(servo_id: int, address: int, data: bytes) -> bytes:
    return build(servo_id, Instruction.WRITE, bytes((address,)) + data)


def sync_read(address: int, size: int, ids: Sequence[int]) -> bytes:
    """Every servo in `ids` answers with `size` bytes, in the order of `ids`."""
    return build(BROADCAST_ID, Instruction.SYNC_READ, bytes((address, size, *ids)))


def sync_write(address: int, data: Mapping[int, bytes]) -> bytes:
    """One write per servo, {id: bytes}, all of one size; never answered."""
    (size,) = {len(item) for item in data.values()}
    params = b"".join(bytes((servo_id,)) + item for servo_id, item in data.items())
    return build(BROADCAST_ID, Instruction.SYNC_WRITE, bytes((address, size)) + params)


class FrameParser:
    """Finds valid frames in a stream of bytes.

    A candidate with an impossible id, length or code, or with a wrong checksum, costs one byte: the
    search continues behind it. A frame is returned only whole and with a right checksum, and never
    from inside another valid frame.
    """

    def __init__(self, max_id: int, max_code: int) -> None:
        self._max_id = max_id
        self._max_code = max_code
        self._buffer = bytearray()
        self.discarded_bytes = 0
        self.bad_checksums = 0

    def feed(self, data: bytes) -> list[Frame]:
        """Frames completed by `data`, oldest first."""
        self._buffer += data
        buffer = self._buffer
        found: list[Frame] = []
        while (start := buffer.find(HEADER)) >= 0:
            self._discard(start)
            if self._impossible():
                self._discard(1)
                continue
            if len(buffer) < 4 or len(buffer) < buffer[3] + 4:
                return found
            end = buffer[3] + 4
            if checksum(buffer[2 : end - 1]) != buffer[end - 1]:
                self.bad_checksums += 1
                self._discard(1)
                continue
            found.append(Frame(buffer[2], buffer[4], bytes(buffer[5 : end - 1])))
            del buffer[:end]
        self._discard(len(buffer) - buffer.endswith(b"\xff"))
        return found

    @property
    def pending_bytes(self) -> int:
        """Bytes kept because they may be the start of a frame."""
        return len(self._buffer)

    def _impossible(self) -> bool:
        head = self._buffer[2:5]
        return (
            (len(head) > 0 and head[0] > self._max_id)
            or (len(head) > 1 and not MIN_LENGTH <= head[1] <= MAX_LENGTH)
            or (len(head) > 2 and head[2] > self._max_code)
        )

    def _discard(self, count: int) -> None:
        self.discarded_bytes += count
        del self._buffer[:count]


def status_parser() -> FrameParser:
    """Parser of what servos send; an error byte above 0x7F is no status frame."""
    return FrameParser(MAX_ID, 0x7F)


def instruction_parser() -> FrameParser:
    """Parser of what a host sends."""
    return FrameParser(BROADCAST_ID, 0xFF)
