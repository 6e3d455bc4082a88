"""TensorFlow V2 checkpoints, read without TensorFlow: variables as arrays by name.

The file `<prefix>.data-00000-of-00001` holds the variables' raw bytes, one after the other.
`<prefix>.index` is a LevelDB table of sorted keys: "" for the header, names for entries. It ends in
a footer that points to its index block, whose entries point to the data blocks. A block is entries
(each omits the prefix that its key shares with the previous key), restart offsets, and a trailer
with a CRC-32C. The header and the entries are protocol buffers (`BundleHeaderProto`,
`BundleEntryProto`).

Every offset, length and checksum is checked: a damaged file is a UserError, never a wrong weight.

Sources: TensorFlow's public `tensor_bundle.proto`, `tensor_shape.proto` and `types.proto`;
LevelDB's `table_format.md`; RFC 3720 (CRC-32C).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from musicgenre.errors import UserError

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
# After each block: the compression type (1 byte) and a checksum.
_TRAILER = 5
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
# State of TensorFlow 1 optimisers: the last part of a name, or the full name.
_SLOTS = ("Adam", "Adam_1", "Momentum", "RMSProp", "RMSProp_1", "Adagrad", "Ftrl", "Ftrl_1")
_OPTIMISER = ("beta1_power", "beta2_power")
_AGAIN = "Fetch it again."

# The fields of a protocol buffer by number: integers, or the bytes of strings and messages.
_Fields = dict[int, list[int | bytes]]


class TensorEntry(NamedTuple):
    """The index entry of a variable: its type's number, shape, shard, bytes and masked CRC-32C.

    A `sliced` variable is stored under other keys.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


def read_checkpoint(read: Callable[[str], bytes], prefix: str) -> dict[str, np.ndarray]:
    """Returns the variables of a checkpoint by name, without optimiser state.

    Args:
      read: returns the bytes of a file by its name.
      prefix: the start of the file names, such as "model/" of "model/.index".

    Raises:
      UserError: a file is damaged or not supported. Errors of `read` pass through.
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
    """Returns the number of data files and every variable's entry, from an index file's bytes.

    Raises:
      UserError: it is damaged or not supported; the message calls it `where`.
    """
    if len(data) < _FOOTER or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise UserError(f"{where}: not the index of a TensorFlow checkpoint. {_AGAIN}")
    footer = _Bytes(data[-_FOOTER:-8], where)
    footer.handle()  # of the metadata, which is empty
    items = [
        item
        for _, handle in _table_entries(_block(data, footer, where))
        for item in _table_entries(_block(data, _Bytes(handle, where), where))
    ]
    if not items or items[0][0]:
        raise UserError(f"{where}: its first key is not the header. {_AGAIN}")
    header = _fields(items[0][1], where)
    shards = _number(header, 1, where)
    if _number(header, 2, where):
        raise UserError(f"{where}: its numbers are big-endian, which is not supported.")
    keys = [key for key, _ in items]
    if any(key >= following for key, following in itertools.pairwise(keys)):
        raise UserError(f"{where}: its keys are not in order. {_AGAIN}")
    entries: dict[str, TensorEntry] = {}
    for key, message in items[1:]:
        try:
            name = key.decode()
        except UnicodeDecodeError:
            raise UserError(f"{where}: a name is not UTF-8. {_AGAIN}") from None
        entries[name] = entry = _entry(message, where)
        if entry.shard >= shards:
            raise UserError(f"{where}: {name!r} is in file {entry.shard} of {shards}. {_AGAIN}")
    return shards, entries


def masked_crc32c(data: bytes) -> int:
    """Returns the CRC-32C of bytes as LevelDB stores it: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli) of bytes; 3 MB take about 0.3 s."""
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@functools.cache
def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


class _Bytes:
    """Bytes with a read position; reading beyond their end is a UserError that names the file."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.position = data, where, 0

    def __bool__(self) -> bool:
        return self.position < len(self.data)

    def take(self, size: int) -> bytes:
        """Returns the next `size` bytes."""
        if size > len(self.data) - self.position:
            raise UserError(f"{self.where}: ends in the middle of an entry. {_AGAIN}")
        self.position += size
        return self.data[self.position - size : self.position]

    def varint(self) -> int:
        """Returns the next unsigned number, 7 bits per byte and at most 64 bits."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128 and value < 1 << 64:
                return value
        raise UserError(f"{self.where}: holds a number of more than 64 bits. {_AGAIN}")

    def handle(self) -> tuple[int, int]:
        """Returns the offset and the size of a block."""
        return self.varint(), self.varint()


def _block(data: bytes, pointer: _Bytes, where: str) -> _Bytes:
    """Returns the block that a handle points to, without its trailer."""
    offset, size = pointer.handle()
    end = offset + size
    if end + _TRAILER > len(data) - _FOOTER:
        raise UserError(f"{where}: points to bytes {offset} to {end} of {len(data)}. {_AGAIN}")
    checksum = int.from_bytes(data[end + 1 : end + _TRAILER], "little")
    if masked_crc32c(data[offset : end + 1]) != checksum:
        raise UserError(f"{where}: the checksum of the block at byte {offset} is wrong. {_AGAIN}")
    if data[end]:
        raise UserError(f"{where}: is compressed (type {data[end]}), which is not supported.")
    return _Bytes(data[offset:end], where)


def _table_entries(block: _Bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block.data[-4:], "little")
    end = len(block.data) - 4 * (restarts + 1)
    if end < 0:
        raise UserError(f"{block.where}: a block is shorter than its list of restarts. {_AGAIN}")
    entries, key = _Bytes(block.data[:end], block.where), b""
    while entries:
        shared, rest, size = entries.varint(), entries.varint(), entries.varint()
        if shared > len(key):
            raise UserError(f"{block.where}: a key shares more than the previous key. {_AGAIN}")
        key = key[:shared] + entries.take(rest)
        yield key, entries.take(size)


def _fields(message: bytes, where: str) -> _Fields:
    source = _Bytes(message, where)
    fields: _Fields = {}
    while source:
        tag = source.varint()
        wire_type = tag & 7
        value: int | bytes
        if wire_type == 0:
            value = source.varint()
        elif wire_type == 2:
            value = source.take(source.varint())
        elif wire_type in (1, 5):
            value = int.from_bytes(source.take(8 if wire_type == 1 else 4), "little")
        else:
            raise UserError(f"{where}: holds a field of an unknown type ({wire_type}). {_AGAIN}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: _Fields, field: int, where: str) -> int:
    """Returns an integer field, or 0 if it is absent, since protocol buffers omit zeros."""
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise UserError(f"{where}: field {field} of an entry is not a number. {_AGAIN}")
    return value


def _messages(fields: _Fields, field: int, where: str) -> Iterator[_Fields]:
    for value in fields.get(field, []):
        if not isinstance(value, bytes):
            raise UserError(f"{where}: field {field} of an entry is not a message. {_AGAIN}")
        yield _fields(value, where)


def _entry(message: bytes, where: str) -> TensorEntry:
    """Parses a `BundleEntryProto`."""
    fields = _fields(message, where)
    shape = tuple(
        _number(axis, 1, where)
        for part in _messages(fields, 2, where)
        for axis in _messages(part, 2, where)
    )
    dtype, shard, offset, size, crc = (_number(fields, field, where) for field in (1, 3, 4, 5, 6))
    return TensorEntry(dtype, shape, shard, offset, size, crc, sliced=7 in fields)


def _tensor(data: bytes, entry: TensorEntry, what: str) -> np.ndarray:
    if entry.sliced:
        raise UserError(f"{what} is stored in slices, which is not supported.")
    if entry.dtype not in _DTYPES:
        raise UserError(f"{what} has TensorFlow's type {entry.dtype}, which is not supported.")
    dtype = np.dtype(_DTYPES[entry.dtype])
    size, end = math.prod(entry.shape) * dtype.itemsize, entry.offset + entry.size
    if size != entry.size or max(entry.shape, default=0) >= 2**31:
        shape = list(entry.shape)
        raise UserError(f"{what} of the shape {shape} cannot have {entry.size} bytes. {_AGAIN}")
    if end > len(data):
        raise UserError(f"{what} ends at byte {end} of {len(data)}. {_AGAIN}")
    raw = data[entry.offset : end]
    if masked_crc32c(raw) != entry.crc:
        raise UserError(f"{what} does not match its checksum. {_AGAIN}")
    return np.frombuffer(raw, dtype).reshape(entry.shape).astype(dtype.newbyteorder("="))
