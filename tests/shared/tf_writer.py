"""Writes TensorFlow V2 checkpoints from the description of the format; tests load it by runpy."""

import struct

import numpy as np

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
MAGIC = bytes.fromhex("57fb808b247547db")


def _table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 * (value & 1))
        table.append(value)
    return table


TABLE = _table()


def slow_crc32c(data):
    """The checksum byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = slow_crc32c(data)
    return ((((crc >> 15) | (crc << 17)) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number(field, value):
    return varint(field << 3) + varint(value)


def message(field, value):
    return varint(field << 3 | 2) + varint(len(value)) + value


def entry(dtype, shape, offset, size, crc, shard=0, extra=b""):
    """A BundleEntryProto; zeros are left out."""
    axes = b"".join(message(2, number(1, length) if length else b"") for length in shape)
    out = number(1, dtype) + message(2, axes)
    out += number(3, shard) if shard else b""
    out += number(4, offset) if offset else b""
    out += number(5, size) if size else b""
    return out + extra + varint(6 << 3 | 5) + struct.pack("<I", crc)


def header(shards, extra=b""):
    return number(1, shards) + extra + message(3, number(1, 1))


def block(items, interval=16):
    """The bytes of a block: keys without the prefix of the previous key, except every sixteenth."""
    out, restarts, last = bytearray(), [], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i % interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += (
            varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        )
        last = key
    restarts = restarts or [0]
    return bytes(out) + b"".join(
        struct.pack("<I", restart) for restart in [*restarts, len(restarts)]
    )


def table(blocks, kind=0):
    """The bytes of a table with a footer; a block is a list of (key, value) or bytes."""
    out, handles = bytearray(), []

    def write(content):
        handle = varint(len(out)) + varint(len(content))
        stored = content + bytes([kind])
        out.extend(stored + struct.pack("<I", masked(stored)))
        return handle

    for items in blocks:
        content, last = (items, b"~") if isinstance(items, bytes) else (block(items), items[-1][0])
        handles.append((last, write(content)))
    meta = write(block([]))
    footer = meta + write(block(handles, interval=1))
    return bytes(out) + footer.ljust(40, b"\0") + MAGIC


def write_checkpoint(folder, variables, *, per_block=7, shards=1):
    """Writes `.index` and `.data-*` into `folder`, rotating the shards; returns the entries."""
    folder.mkdir(parents=True, exist_ok=True)
    data = [bytearray() for _ in range(shards)]
    items = [(b"", header(shards))]
    for i, name in enumerate(sorted(variables)):
        value = np.asarray(variables[name])
        raw, shard = value.astype(value.dtype.newbyteorder("<")).tobytes(), i % shards
        proto = entry(
            DTYPES[value.dtype.name], value.shape, len(data[shard]), len(raw), masked(raw), shard
        )
        items.append((name.encode(), proto))
        data[shard] += raw
    (folder / ".index").write_bytes(
        table([items[i : i + per_block] for i in range(0, len(items), per_block)])
    )
    for i, content in enumerate(data):
        (folder / f".data-{i:05d}-of-{shards:05d}").write_bytes(content)
    return items
