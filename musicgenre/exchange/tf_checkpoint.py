"""TensorFlow V2 checkpoints, read without TensorFlow: variables by name as arrays.

A checkpoint with the prefix `p` is two or more files:

    p.index                     a table of sorted keys (LevelDB's format): "" has the header, a name the entry of its variable
    p.data-00000-of-00001       the variables' raw bytes, one after the other

The table ends in a footer that points to its index block, whose entries point to the data blocks. A block is entries with the
prefix that a key shares with the one before it left out, restart offsets, and a trailer with a CRC-32C. The header and the
entries are protocol buffers (`BundleHeaderProto`, `BundleEntryProto`), of which the few fields that matter are read here.

Every offset, length and checksum is checked, so that a damaged file is a UserError and never a wrong weight.

Sources: TensorFlow's public `tensor_bundle.proto`, `tensor_shape.proto` and `types.proto`; LevelDB's `table_format.md`; RFC 3720
(CRC-32C).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from musicgenre.errors import UserError

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
# Kind of compression and checksum after each block.
_TRAILER = 5
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
# What optimisers of TensorFlow 1 keep beside the variables: a last part of the name, or the whole of it.
_SLOTS = ("Adam", "Adam_1", "Momentum", "RMSProp", "RMSProp_1", "Adagrad", "Ftrl", "Ftrl_1")
_OPTIMISER = ("beta1_power", "beta2_power")
# Parts of a long input that the checksum goes through side by side.
_LANES = 1024


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a variable lies.

    Attributes:
      dtype: TensorFlow's number of the type.
      shape: its shape.
      shard: number of the data file.
      offset: first byte in that file.
      size: bytes.
      crc: masked CRC-32C of the bytes.
      sliced: the variable is stored in parts under other keys.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


def read_checkpoint(read: Callable[[str], bytes], prefix: str) -> dict[str, np.ndarray]:
    """Returns the variables of a checkpoint by name, but for what an optimiser keeps.

    Args:
      read: returns the bytes of a file by its name.
      prefix: what the names of the files begin with, such as "model/" of "model/.index".

    Raises:
      UserError: a file is not what it should be; the message names it, the variable, and what is wrong. What `read` raises
        passes through.
    """
    shards, entries = parse_index(read(f"{prefix}.index"), f"{prefix}.index")
    files: dict[int, bytes] = {}
    variables = {}
    for name, entry in entries.items():
        if name in _OPTIMISER or name.rsplit("/", 1)[-1] in _SLOTS:
            continue
        path = f"{prefix}.data-{entry.shard:05d}-of-{shards:05d}"
        if entry.shard not in files:
            files[entry.shard] = read(path)
        variables[name] = _tensor(files[entry.shard], entry, f"{path}: the variable {name!r}")
    return variables


def parse_index(data: bytes, where: str) -> tuple[int, dict[str, TensorEntry]]:
    """Reads an index file.

    Args:
      data: its bytes.
      where: its name, for messages.

    Returns:
      The number of data files, and every variable's entry by its name.

    Raises:
      UserError: it is damaged, or of a kind that is not read here.
    """
    if len(data) < _FOOTER or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise UserError(
            f"{where}: not the index of a TensorFlow checkpoint (its last bytes differ). Fetch it again."
        )
    footer = _Bytes(data[-_FOOTER:-8], where)
    footer.handle()
    blocks = _Bytes(_block(data, *footer.handle(), where), where)
    header: dict[int, list[int | bytes]] | None = None
    entries: dict[str, TensorEntry] = {}
    last = b""
    for _, value in _table_entries(blocks):
        block = _Bytes(_block(data, *_Bytes(value, where).handle(), where), where)
        for key, message in _table_entries(block):
            if header is None:
                if key:
                    raise UserError(f"{where}: its first key is not the header. Fetch it again.")
                header = _fields(message, where)
                continue
            if key <= last:
                raise UserError(f"{where}: its keys are not in order. Fetch it again.")
            last = key
            try:
                entries[key.decode()] = _entry(message, where)
            except UnicodeDecodeError:
                raise UserError(f"{where}: a name is not UTF-8. Fetch it again.") from None
    if header is None:
        raise UserError(f"{where}: holds no header. Fetch it again.")
    shards = _number(header, 1, where)
    if _number(header, 2, where):
        raise UserError(f"{where}: its numbers are big-endian, which is not read here.")
    for name, entry in entries.items():
        if entry.shard >= shards:
            raise UserError(
                f"{where}: the variable {name!r} lies in file {entry.shard} of {shards}. Fetch it again."
            )
    return shards, entries


def masked_crc32c(data: bytes) -> int:
    """Returns the CRC-32C of bytes as LevelDB and TensorFlow store it: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli) of bytes.

    Long inputs are cut into lanes, whose remainders are computed side by side. The remainder of two parts is that of the
    first, moved on by the length of the second, xor that of the second; what moving on does to each of the 32 bits comes out
    of 32 more lanes, which start with that bit and read zeros.
    """
    if len(data) < 4 * _LANES:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = _CRC_LIST[(crc ^ byte) & 255] ^ crc >> 8
        return crc ^ 0xFFFFFFFF
    width = -(-len(data) // _LANES)
    # Zeros in front do not change a remainder that starts at zero; the usual start is the same as four bytes inverted.
    padded = np.zeros(_LANES * width, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[len(padded) - len(data) :][:4] ^= 255
    columns = np.zeros((width, _LANES + 32), np.uint8)
    columns[:, :_LANES] = padded.reshape(_LANES, width).T
    state = np.concatenate(
        [np.zeros(_LANES, np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)]
    )
    for column in columns:
        state = _CRC_TABLE[(state & 255) ^ column] ^ state >> 8
    moved = state[_LANES:].tolist()
    crc = 0
    for lane in state[:_LANES].tolist():
        shifted = 0
        for bit in range(32):
            if crc >> bit & 1:
                shifted ^= moved[bit]
        crc = shifted ^ lane
    return crc ^ 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC_LIST = _crc_table()
_CRC_TABLE = np.array(_CRC_LIST, np.uint32)


class _Bytes:
    """Bytes with a place to read from; what goes beyond their end is a UserError that names the file."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.place = data, where, 0

    def __bool__(self) -> bool:
        return self.place < len(self.data)

    def take(self, size: int) -> bytes:
        """Returns the next `size` bytes."""
        if size > len(self.data) - self.place:
            raise UserError(f"{self.where}: ends in the middle of an entry. Fetch it again.")
        self.place += size
        return self.data[self.place - size : self.place]

    def varint(self) -> int:
        """Returns the next unsigned number of seven bits a byte, at most 64 bits."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                if value >= 1 << 64:
                    break
                return value
        raise UserError(f"{self.where}: holds a number of more than 64 bits. Fetch it again.")

    def handle(self) -> tuple[int, int]:
        """Returns the offset and the size of a block."""
        return self.varint(), self.varint()


def _block(data: bytes, offset: int, size: int, where: str) -> bytes:
    """Returns a block's bytes without its trailer."""
    if offset + size + _TRAILER > len(data) - _FOOTER:
        raise UserError(
            f"{where}: points to bytes {offset} to {offset + size}, beyond its {len(data)}. Fetch it again."
        )
    stored = int.from_bytes(data[offset + size + 1 : offset + size + _TRAILER], "little")
    if masked_crc32c(data[offset : offset + size + 1]) != stored:
        raise UserError(
            f"{where}: the checksum of its bytes from {offset} on does not fit them. Fetch it again."
        )
    if kind := data[offset + size]:
        raise UserError(f"{where}: is compressed (kind {kind}), which is not read here.")
    return data[offset : offset + size]


def _table_entries(block: _Bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block."""
    restarts = int.from_bytes(block.data[-4:], "little")
    end = len(block.data) - 4 * (restarts + 1)
    if end < 0:
        raise UserError(
            f"{block.where}: a block is shorter than the list of its restarts. Fetch it again."
        )
    entries, key = _Bytes(block.data[:end], block.where), b""
    while entries:
        shared, rest, size = entries.varint(), entries.varint(), entries.varint()
        if shared > len(key):
            raise UserError(
                f"{block.where}: a key repeats more of the one before it than that has. Fetch it again."
            )
        key = key[:shared] + entries.take(rest)
        yield key, entries.take(size)


def _fields(message: bytes, where: str) -> dict[int, list[int | bytes]]:
    """Returns the fields of a protocol buffer by number: integers, or the bytes of strings and messages."""
    source = _Bytes(message, where)
    fields: dict[int, list[int | bytes]] = {}
    while source:
        tag = source.varint()
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value = source.varint()
        elif kind == 2:
            value = source.take(source.varint())
        elif kind in (1, 5):
            value = int.from_bytes(source.take(8 if kind == 1 else 4), "little")
        else:
            raise UserError(f"{where}: holds a field of an unknown kind ({kind}). Fetch it again.")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], field: int, where: str) -> int:
    """Returns an integer field; 0 where it is not there, as protocol buffers leave zeros out."""
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise UserError(f"{where}: field {field} of an entry is not a number. Fetch it again.")
    return value


def _entry(message: bytes, where: str) -> TensorEntry:
    """Returns what a `BundleEntryProto` says."""

    def messages(
        fields: dict[int, list[int | bytes]], field: int
    ) -> list[dict[int, list[int | bytes]]]:
        found = fields.get(field, [])
        if not all(isinstance(value, bytes) for value in found):
            raise UserError(f"{where}: field {field} of an entry is not a message. Fetch it again.")
        return [_fields(value, where) for value in found if isinstance(value, bytes)]

    fields = _fields(message, where)
    shapes = messages(fields, 2)
    shape = tuple(_number(axis, 1, where) for part in shapes for axis in messages(part, 2))
    dtype, shard, offset, size, crc = (_number(fields, field, where) for field in (1, 3, 4, 5, 6))
    return TensorEntry(dtype, shape, shard, offset, size, crc, sliced=7 in fields)


def _tensor(data: bytes, entry: TensorEntry, what: str) -> np.ndarray:
    """Returns a variable out of its data file."""
    if entry.sliced:
        raise UserError(f"{what} is stored in slices, which are not read here.")
    if entry.dtype not in _DTYPES:
        raise UserError(
            f"{what} has TensorFlow's type {entry.dtype}; floating-point numbers and integers are read here."
        )
    dtype = np.dtype(_DTYPES[entry.dtype])
    if (
        math.prod(entry.shape) * dtype.itemsize != entry.size
        or max(entry.shape, default=0) >= 2**31
    ):
        raise UserError(
            f"{what} of the shape {list(entry.shape)} cannot have {entry.size} bytes. Fetch the checkpoint again."
        )
    if entry.offset + entry.size > len(data):
        raise UserError(
            f"{what} goes to byte {entry.offset + entry.size} of {len(data)}. Fetch the file again."
        )
    raw = data[entry.offset : entry.offset + entry.size]
    if masked_crc32c(raw) != entry.crc:
        raise UserError(f"{what} does not fit its checksum. Fetch the file again.")
    return np.frombuffer(raw, dtype).reshape(entry.shape).astype(dtype.newbyteorder("="))
