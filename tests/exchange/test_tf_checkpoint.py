from pathlib import Path

import numpy as np
import pytest
import tf_writer as tf

from musicgenre.errors import UserError
from musicgenre.exchange.tf_checkpoint import crc32c, parse_index, read_checkpoint


def read(name):
    return Path(name).read_bytes()


def variables():
    """Variables of several types, shapes and shared name prefixes, with Adam's state."""
    generator = np.random.default_rng(0)
    values = {
        "beta1_power": np.float32(0.9),
        "beta2_power": np.float32(0.99),
        "global_step": np.int64(-5),
    }
    for i in range(9):
        for leaf, shape in (("kernel", (3, 2, i + 1)), ("bias", (i + 1,))):
            name = f"conv2d_{i}/{leaf}"
            values[name] = generator.standard_normal(shape).astype(np.float32)
            values[f"{name}/Adam"] = values[f"{name}/Adam_1"] = np.zeros(shape, np.float32)
    values["double"] = generator.standard_normal(4)
    values["half"] = generator.standard_normal((2, 3)).astype(np.float16)
    values["counts"] = np.array([1, -2, 2**31 - 1], np.int32)
    values["empty"] = np.zeros((0, 4), np.float32)
    return values


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),
        (b"", 0),
        # RFC 3720, B.4.
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_checksum_is_that_of_rfc_3720(data, crc):
    assert crc32c(data) == crc


@pytest.mark.parametrize(("per_block", "shards"), [(1, 1), (7, 1), (1000, 1), (5, 3)])
def test_written_variables_are_read(tmp_path, per_block, shards):
    written = variables()
    items = tf.write_checkpoint(tmp_path, written, per_block=per_block, shards=shards)
    found = read_checkpoint(read, f"{tmp_path}/")
    kept = {
        name: value for name, value in written.items() if "Adam" not in name and "power" not in name
    }
    assert len(kept) == 23 and found.keys() == kept.keys()
    for name, value in kept.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)
        assert found[name].flags.writeable or not found[name].size
    count, entries = parse_index(read(f"{tmp_path}/.index"), "index")
    assert count == shards and len(entries) == len(items) - 1 == 61


def test_bytes_worked_by_hand():
    """A table of one variable `w` of the shape [2], byte by byte."""
    raw = np.array([1.0, -2.0], "<f4").tobytes()
    entry = bytes.fromhex("0801 1204 1202 0802 2808 35") + tf.masked(raw).to_bytes(4, "little")
    contents = bytes.fromhex("0000 06 0801 1a02 0801 00 01") + bytes([len(entry)]) + b"w" + entry
    contents += (0).to_bytes(4, "little") + (1).to_bytes(4, "little")
    count, entries = parse_index(tf.table([contents]), "index")
    assert count == 1 and (
        entries["w"].dtype,
        entries["w"].shape,
        entries["w"].offset,
        entries["w"].size,
    ) == (1, (2,), 0, 8)
    files = {"p.index": tf.table([contents]), "p.data-00000-of-00001": raw}
    np.testing.assert_array_equal(read_checkpoint(files.__getitem__, "p")["w"], [1.0, -2.0])


def test_every_damaged_byte_is_detected(tmp_path):
    """A changed byte or a missing end is an error, or (in padding) leaves the entries equal."""
    tf.write_checkpoint(
        tmp_path,
        {"a/kernel": np.ones((2, 2), np.float32), "a/bias": np.ones(2, np.float32)},
        per_block=2,
    )
    index = read(f"{tmp_path}/.index")
    expected = parse_index(index, "index")
    undetected = 0
    for position in range(len(index)):
        for flip in (1, 128):
            damaged = bytearray(index)
            damaged[position] ^= flip
            try:
                found = parse_index(bytes(damaged), "index")
            except UserError:
                continue
            assert found == expected
            undetected += 1
        with pytest.raises(UserError):
            parse_index(index[:position], "index")
    # Not read: the empty metadata block, its handle, and the padding of the footer.
    assert undetected <= 2 * (8 + 5 + 2 + 36)


def test_damaged_data(tmp_path):
    tf.write_checkpoint(tmp_path, {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)})
    data = tmp_path / ".data-00000-of-00001"
    written = data.read_bytes()
    data.write_bytes(written[:13] + b"!" + written[14:])
    with pytest.raises(
        UserError, match=r"data-00000-of-00001: the variable 'b' does not match its checksum"
    ):
        read_checkpoint(read, f"{tmp_path}/")
    data.write_bytes(written[:-1])
    with pytest.raises(UserError, match="the variable 'b' ends at byte 24 of 23"):
        read_checkpoint(read, f"{tmp_path}/")


def good(**changes):
    fields = {
        "dtype": 1,
        "shape": (2,),
        "offset": 0,
        "size": 8,
        "crc": tf.masked(b"\0" * 8),
    } | changes
    return tf.entry(**fields)


HEADER = (b"", tf.header(1))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            [[HEADER, (b"w", good(size=4))]],
            r"the variable 'w' of the shape \[2\] cannot have 4 bytes",
        ),
        ([[HEADER, (b"w", good(shape=(2**62, 0), size=0))]], "cannot have 0 bytes"),
        ([[HEADER, (b"w", good(shape=(2**64 - 1, 2**64 - 2)))]], "cannot have 8 bytes"),
        ([[HEADER, (b"w", good(offset=1))]], "ends at byte 9 of 8"),
        ([[HEADER, (b"w", good(offset=2**63))]], "ends at byte"),
        ([[HEADER, (b"w", good(dtype=7))]], "has TensorFlow's type 7"),
        ([[HEADER, (b"w", good(shard=1))]], "'w' is in file 1 of 1"),
        ([[HEADER, (b"w", good(extra=tf.message(7, b"")))]], "is stored in slices"),
        ([[HEADER, (b"w", good(extra=bytes([7 << 3 | 3])))]], r"a field of an unknown type \(3\)"),
        ([[HEADER, (b"w", tf.number(2, 5))]], "field 2 of an entry is not a message"),
        ([[HEADER, (b"w", tf.message(1, b""))]], "field 1 of an entry is not a number"),
        ([[HEADER, (b"w", good()[:-1])]], "ends in the middle of an entry"),
        ([[HEADER, (b"w", good() + b"\xff" * 12)]], "a number of more than 64 bits"),
        (
            [[HEADER, (b"w", good() + bytes([9 << 3, *b"\xff" * 9, 2]))]],
            "a number of more than 64 bits",
        ),
        ([[HEADER, (b"\xff", good())]], "a name is not UTF-8"),
        ([[HEADER, (b"w", good()), (b"v", good())]], "keys are not in order"),
        ([[(b"w", good())]], "its first key is not the header"),
        ([[(b"", tf.header(1, tf.number(2, 1)))]], "big-endian"),
        ([], "its first key is not the header"),
        (
            [bytes.fromhex("050100") + b"w" + bytes(4) + b"\x01\0\0\0"],
            "a key shares more than the previous key",
        ),
        ([b"\x01\x01\x00\x00"], "shorter than its list of restarts"),
        ([b""], "shorter than its list of restarts"),
    ],
)
def test_wrong_entries_with_correct_checksums(blocks, message):
    files = {"p.index": tf.table(blocks), "p.data-00000-of-00001": bytes(8)}
    with pytest.raises(UserError, match=message):
        read_checkpoint(files.__getitem__, "p")


def test_other_files_are_refused_as_an_index():
    with pytest.raises(UserError, match=r"notes.txt: not the index of a TensorFlow checkpoint"):
        parse_index(
            b"some text that is longer than a footer, and no table of any kind", "notes.txt"
        )
    with pytest.raises(UserError, match="not the index"):
        parse_index(b"", "x")
    with pytest.raises(UserError, match=r"is compressed \(type 1\)"):
        parse_index(tf.table([[HEADER]], kind=1), "x")
    footer = (tf.varint(0) * 2 + tf.varint(2**40) + tf.varint(9)).ljust(40, b"\0") + tf.MAGIC
    with pytest.raises(UserError, match=f"points to bytes {2**40} to {2**40 + 9} of 48"):
        parse_index(footer, "x")
