"""The two binary formats of xet: shards, which say of which chunks files consist, and xorbs, which hold the chunks.

All numbers are little-endian. A shard is a header of 48 bytes, a section of files, a section of xorbs; each section
is a list of blocks made of 48-byte records, and ends with a record that begins with 32 bytes 0xff. A xorb is a list of
chunks, each with a header of 8 bytes: version, compressed size (3 bytes), compression scheme, size (3 bytes).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from hub_server.errors import HubError

_RECORD = 48
_FOOTER = 200
_END = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_SHA256 = 1 << 30


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of chunks of a xorb."""

    xorb: str
    size: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class XetFile:
    """A file as the chunks it consists of."""

    hash: str
    sha256: str | None
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return sum(segment.size for segment in self.segments)


def _hash(data: bytes) -> str:
    """Return a hash as xet writes it: four words of 64 bits, each in hexadecimal."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def _blocks(shard: bytes, start: int) -> Iterator[tuple[int, int, int]]:
    """Yield (position, flags, number of entries) of each block of a section; the last is (its end, 0, -1)."""
    position = start
    while shard[position : position + 32] != _END:
        flags, count = struct.unpack_from("<II", shard, position + 32)
        yield position, flags, count
        verification = count if flags & _HAS_VERIFICATION else 0
        position += _RECORD * (1 + count + verification + bool(flags & _HAS_SHA256))
    yield position + _RECORD, 0, -1


def _segments(shard: bytes, start: int, count: int) -> Iterator[Segment]:
    for position in range(start, start + _RECORD * count, _RECORD):
        _, size, first, end = struct.unpack_from("<4I", shard, position + 32)
        yield Segment(_hash(shard[position : position + 32]), size, first, end)


def _files_and_end(shard: bytes) -> tuple[list[XetFile], int]:
    files: list[XetFile] = []
    for position, flags, count in _blocks(shard, _RECORD):
        if count < 0:
            return files, position
        segments = tuple(_segments(shard, position + _RECORD, count))
        extra = position + _RECORD * (1 + count + (count if flags & _HAS_VERIFICATION else 0))
        sha256 = _hash(shard[extra : extra + 32]) if flags & _HAS_SHA256 else None
        files.append(XetFile(_hash(shard[position : position + 32]), sha256, segments))
    raise AssertionError("a section always ends")


def read_files(shard: bytes) -> list[XetFile]:
    """Return the files that a shard describes."""
    try:
        return _files_and_end(shard)[0]
    except struct.error as err:
        raise HubError(400, "The shard is cut short") from err


def read_chunks(shard: bytes) -> list[str]:
    """Return the hashes of the chunks of the xorbs that a shard describes."""
    chunks: list[str] = []
    for position, _, count in _blocks(shard, _files_and_end(shard)[1]):
        entries = range(position + _RECORD, position + _RECORD * (1 + count), _RECORD)
        chunks += [_hash(shard[entry : entry + 32]) for entry in entries]
    return chunks


def dedup_shard(shard: bytes, *, expires: int) -> bytes:
    """Return the shard that answers a client which asks whether chunks are known: xorbs, no files, and a footer.

    Uploaded shards have no footer. Here it says where the sections begin, that chunks are named by their plain hash
    (an HMAC key of zeros) and until when, in seconds since the epoch, the client may rely on it.
    """
    header = shard[: _RECORD - 8] + struct.pack("<Q", _FOOTER)
    no_files = _END + bytes(_RECORD - len(_END))
    start = _files_and_end(shard)[1]
    xorbs = shard[start : [position for position, _, _ in _blocks(shard, start)][-1]]
    sections = header + no_files + xorbs
    end = len(sections)
    # Version, where the sections are, then three empty tables (place, entries), which clients measure the sections by.
    places = struct.pack("<9Q", 1, _RECORD, 2 * _RECORD, end, 0, end, 0, end, 0)
    footer = places + bytes(32) + struct.pack("<2Q", 0, expires) + bytes(9 * 8) + struct.pack("<Q", end)
    assert len(footer) == _FOOTER
    return sections + footer


def chunk_offsets(xorb: bytes) -> list[int]:
    """Return where each chunk of a xorb begins, and where the last one ends."""
    offsets = [0]
    while offsets[-1] + 8 <= len(xorb) and xorb[offsets[-1] : offsets[-1] + 7] != b"XETBLOB":
        offsets.append(offsets[-1] + 8 + int.from_bytes(xorb[offsets[-1] + 1 : offsets[-1] + 4], "little"))
    return offsets


def read_segment(xorb: bytes, segment: Segment) -> bytes:
    """Return the content of a run of chunks."""
    offsets = chunk_offsets(xorb)
    return b"".join(_chunk(xorb, offset) for offset in offsets[segment.first : segment.end])


def _chunk(xorb: bytes, offset: int) -> bytes:
    stored = xorb[offset + 8 : offset + 8 + int.from_bytes(xorb[offset + 1 : offset + 4], "little")]
    scheme, size = xorb[offset + 4], int.from_bytes(xorb[offset + 5 : offset + 8], "little")
    if scheme == 0:
        return stored
    data = decompress_lz4(stored)
    return data if scheme == 1 else _ungroup(data, size)


def _ungroup(data: bytes, size: int) -> bytes:
    """Undo the grouping of bytes by their position in words of four, which makes weights compress better."""
    words = bytearray(size)
    start = 0
    for lane in range(4):
        count = (size - lane + 3) // 4
        words[lane::4] = data[start : start + count]
        start += count
    return bytes(words)


def decompress_lz4(frame: bytes) -> bytes:
    """Return the content of an LZ4 frame."""
    flags = frame[4]
    position = 7 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0)
    content = bytearray()
    while size := int.from_bytes(frame[position : position + 4], "little"):
        stored = frame[position + 4 : position + 4 + (size & 0x7FFFFFFF)]
        if size >> 31:
            content += stored
        else:
            _decompress_block(stored, content)
        position += 4 + len(stored) + (4 if flags & 0x10 else 0)
    return bytes(content)


def _length(block: bytes, position: int, nibble: int) -> tuple[int, int]:
    """Return a length that begins in half a byte and may go on in whole ones, and the position after it."""
    total = nibble
    more = nibble == 15
    while more:
        total += block[position]
        more = block[position] == 255
        position += 1
    return total, position


def _decompress_block(block: bytes, content: bytearray) -> None:
    """Append what a block of an LZ4 frame holds: literals, each run followed by a copy of earlier content."""
    position = 0
    while position < len(block):
        token = block[position]
        literals, position = _length(block, position + 1, token >> 4)
        content += block[position : position + literals]
        position += literals
        if position == len(block):
            return  # the last run has no copy
        distance = int.from_bytes(block[position : position + 2], "little")
        count, position = _length(block, position + 2, token & 15)
        count += 4
        start = len(content) - distance
        earlier = bytes(content[start : start + count])
        content += (earlier * -(-count // distance))[:count] if distance < count else earlier
