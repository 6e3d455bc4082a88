import errno
import hashlib
import http.server
import io
import json
import shutil
import socket
import stat
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from mtat_tree import make_mtat_tree

from musicgenre.datasets.fetch import mtat as module
from musicgenre.datasets.fetch.mtat import (
    MTAT_FILES,
    RemoteFile,
    check_members,
    download_mtat,
    unpack,
)
from musicgenre.datasets.mtat import EMPTY_IN_THE_ARCHIVE, load_mtat, read_table
from musicgenre.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
PARTS = [file.name for file in MTAT_FILES if file.part]
MEMBER = module._MTAT_MEMBER


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` as `server` is told to; every request is noted in `server.log`."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server, name = self.server, self.path.lstrip("/")
        asked = self.headers.get("Range", "")
        server.log.append((self.command, name, asked))
        if server.statuses.get(name):
            return self.head(server.statuses[name].pop(0), {"Content-Length": "0"})
        if name not in server.files:
            return self.head(404, {"Content-Length": "0"})
        data, fields = server.files[name], {}
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        if server.etags:
            fields["ETag"] = etag if server.etags == "strong" else f"W/{etag}"
        if server.modified:
            fields["Last-Modified"] = server.modified
        start, stop = 0, len(data)
        # As the standard has it, a weak tag never matches.
        guard = self.headers.get("If-Range")
        same = not guard or not server.checks_if_range or guard in (etag, server.modified)
        if server.ranges and asked and same:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start >= len(data):
                return self.head(
                    416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"}
                )
            stop = min(stop, start + server.longest_range)
            fields["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.head(
            206 if "Content-Range" in fields else 200,
            fields | {"Content-Length": str(stop - start)},
        )
        if body:
            cuts = server.cuts.get(name)
            sent = data[start:stop][: cuts.pop(0) if cuts else None]
            self.wfile.write(sent)
            server.sent += len(sent)
            if len(sent) < stop - start:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def head(self, code, fields):
        self.send_response(code)
        self.send_header("Content-Type", self.server.kind)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


def archive_of(tree):
    """The mp3s of a tree as a ZIP file; its bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(tree.rglob("*.mp3")):
            archive.write(path, path.relative_to(tree))
    return stream.getvalue()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The files of the host: 12 clips of 40,000 random bytes, one of which is empty, and the archive in three parts."""
    tree = make_mtat_tree(tmp_path_factory.mktemp("published"), clips=12, audio=False)
    generator = np.random.default_rng(0)
    for number, mp3_path in enumerate(read_table(tree).mp3_paths):
        (tree / mp3_path).parent.mkdir(exist_ok=True)
        (tree / mp3_path).write_bytes(generator.bytes(0 if number == 3 else 40_000))
    whole = archive_of(tree)
    # Cut where it hurts: inside the first member's name, and anywhere.
    parts = (whole[:33], whole[33:300_001], whole[300_001:])
    files = {
        "annotations_final.csv": (tree / "annotations_final.csv").read_bytes(),
        "clip_info_final.csv": b"clip_id\ttrack\n",
    }
    return tree, files | dict(zip(PARTS, parts, strict=True))


@pytest.fixture
def host(published, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.log, server.statuses, server.cuts, server.sent = (
        dict(published[1]),
        [],
        {},
        {},
        0,
    )
    server.ranges = server.checks_if_range = True
    server.etags, server.modified = "strong", ""
    server.longest_range = 2**30
    server.kind = "application/octet-stream"
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(root, host, **options):
    return download_mtat(root, host.url, progress=False, **{"pause": 0.0, "attempts": 3} | options)


def ranges(host, name):
    return [asked for command, wanted, asked in host.log if command == "GET" and wanted == name]


def test_everything_comes_once_and_is_whole(host, published, tmp_path):
    tree, files = published
    root = tmp_path / "mtat"
    summary = fetch(root, host)
    assert summary.fetched == tuple(file.name for file in MTAT_FILES) and summary.verified == ()
    assert (summary.unpacked.written, summary.unpacked.present, summary.unpacked.broken) == (
        12,
        0,
        {},
    )
    for path in tree.rglob("*.mp3"):
        assert (root / path.relative_to(tree)).read_bytes() == path.read_bytes()
    for name, content in files.items():
        assert (root / name).read_bytes() == content
    record = json.loads((root / "downloads.json").read_text())["files"]
    assert record[PARTS[1]]["sha256"] == hashlib.sha256(files[PARTS[1]]).hexdigest()
    assert record[PARTS[1]]["size"] == 300_001 - 33
    empty = read_table(tree).mp3_paths[3]
    assert (
        summary.broken == {empty: "empty file (0 bytes)"}
        and summary.missing == ()
        and not summary.complete
    )
    assert summary.lines() == [
        f"{root}: 5 files fetched, 0 there already and checked.",
        "12 mp3s unpacked, 0 there already.",
        "11 of the table's 12 mp3s can be used, 0 are missing, 1 broken.",
        f"  broken {empty}: empty file (0 bytes)",
    ]
    assert len(load_mtat(root, "all", top_k=5).clips) == 12
    assert sorted(path.name for path in root.iterdir() if path.is_file()) == sorted(
        [*files, "downloads.json"]
    )
    assert not (root / "partial").exists()


def test_a_second_run_asks_for_nothing_and_mends_what_is_damaged(host, published, tmp_path):
    fetch(tmp_path, host)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    host.log.clear()
    summary = fetch(tmp_path, host)
    assert host.log == [] and summary.fetched == () and len(summary.verified) == 5
    assert (summary.unpacked.written, summary.unpacked.present) == (0, 12)
    assert times == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    }

    mp3s = [tmp_path / path for path in read_table(tmp_path).mp3_paths]
    mp3s[0].unlink()
    mp3s[1].write_bytes(b"half")
    (tmp_path / PARTS[2]).write_bytes(b"damaged")
    summary = fetch(tmp_path, host)
    assert summary.fetched == (PARTS[2],) and (
        summary.unpacked.written,
        summary.unpacked.present,
    ) == (2, 10)
    assert (tmp_path / PARTS[2]).read_bytes() == published[1][PARTS[2]]
    assert mp3s[1].stat().st_size == 40_000

    for name in PARTS:
        (tmp_path / name).unlink()
    host.log.clear()
    summary = fetch(tmp_path, host)
    assert host.log == [] and summary.unpacked is None and summary.missing == ()
    mp3s[0].unlink()
    assert fetch(tmp_path, host).fetched == tuple(PARTS) and mp3s[0].stat().st_size == 40_000


def test_a_broken_connection_is_taken_up_where_it_broke(host, published, tmp_path):
    host.cuts[PARTS[1]] = [150_000, 20]
    fetch(tmp_path, host)
    first, second, third = ranges(host, PARTS[1])
    assert first == "" and second == third  # the 20 bytes were less than a piece
    begin = int(second.removeprefix("bytes=").removesuffix("-"))
    assert 150_000 - 2**16 <= begin <= 150_000
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]
    total = sum(map(len, published[1].values()))
    assert host.sent == total + 150_000 - begin + 20


def test_what_came_is_kept_for_the_next_run(host, published, tmp_path):
    host.cuts[PARTS[1]] = [200_000, 0, 0]
    with pytest.raises(
        UserError,
        match=r"mp3\.zip\.002: the connection broke; gave up after 2 tries in a row\. [\d,]+ bytes are kept",
    ):
        fetch(tmp_path, host, attempts=2)
    half = tmp_path / "partial" / f"{PARTS[1]}.part"
    size = half.stat().st_size
    assert published[1][PARTS[1]].startswith(half.read_bytes()) and size >= 200_000 - 2**16
    assert not (tmp_path / PARTS[1]).exists()
    host.log.clear()
    summary = fetch(tmp_path, host)
    assert ranges(host, PARTS[1]) == [f"bytes={size}-"] and ranges(host, PARTS[0]) == []
    assert summary.fetched == tuple(PARTS[1:]) and summary.unpacked.broken == {}


def test_a_host_without_ranges_starts_the_file_again(host, published, tmp_path):
    host.ranges = False
    host.cuts[PARTS[1]] = [200_000, 100_000]
    fetch(tmp_path, host)
    assert len(ranges(host, PARTS[1])) == 3 and all(ranges(host, PARTS[1])[1:])
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]
    # Every second try gets further than the one before it, but none further than the first.
    host.cuts[PARTS[1]] = [200_000, 100_000] * 5
    with pytest.raises(UserError, match="gave up after 3 tries in a row"):
        fetch(tmp_path / "again", host)
    assert len(host.cuts[PARTS[1]]) == 6


def test_a_host_that_sends_less_than_the_rest_is_asked_again(host, published, tmp_path):
    host.cuts[PARTS[1]] = [100_000]
    host.longest_range = 50_000
    fetch(tmp_path, host)
    assert len(ranges(host, PARTS[1])) >= 5
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]


def test_a_run_that_was_stopped_between_the_last_byte_and_the_renaming(host, published, tmp_path):
    host.cuts[PARTS[1]] = [0, 0, 0]
    with pytest.raises(UserError, match="gave up"):
        fetch(tmp_path, host)
    (tmp_path / "partial" / f"{PARTS[1]}.part").write_bytes(published[1][PARTS[1]])
    host.log.clear()
    summary = fetch(tmp_path, host)
    assert ranges(host, PARTS[1]) == [] and PARTS[1] in summary.fetched
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]


@pytest.mark.parametrize(
    ("etags", "modified", "checks_if_range", "length"),
    [
        ("strong", "", True, 100_000),
        ("weak", "Wed, 21 Oct 2015 07:28:00 GMT", True, 100_000),
        ("", "Wed, 21 Oct 2015 07:28:00 GMT", True, 100_000),
        ("strong", "", False, 100_000),
        ("", "Wed, 21 Oct 2015 07:28:00 GMT", False, 100_000),
        ("", "", True, 100_001),
    ],
)
def test_halves_of_two_versions_are_never_joined(
    host, published, tmp_path, etags, modified, checks_if_range, length
):
    host.etags, host.modified, host.checks_if_range = etags, modified, checks_if_range
    host.cuts["clip_info_final.csv"] = [150_000, 0, 0, 0]
    host.files["clip_info_final.csv"] = b"old" * 100_000
    with pytest.raises(UserError, match="gave up"):
        fetch(tmp_path, host)
    new = b"new" * length
    host.files["clip_info_final.csv"] = new
    host.modified = modified.replace("2015", "2016")
    host.log.clear()
    fetch(tmp_path, host)
    assert (tmp_path / "clip_info_final.csv").read_bytes() == new
    # A host that minds If-Range sends the new file at once, another is asked a second time.
    at_once = checks_if_range and (etags or modified)
    assert [bool(asked) for asked in ranges(host, "clip_info_final.csv")] == (
        [True] if at_once else [True, False]
    )


def test_a_half_is_continued_under_a_weak_tag(host, tmp_path):
    host.etags, host.modified = "weak", "Wed, 21 Oct 2015 07:28:00 GMT"
    host.cuts[PARTS[1]] = [200_000]
    fetch(tmp_path, host)
    assert len(ranges(host, PARTS[1])) == 2
    assert 0 <= host.sent - sum(map(len, host.files.values())) <= 2**16


def test_without_size_and_version_nothing_is_continued(host, tmp_path):
    """A half of which nothing is known but its length is thrown away."""
    half = tmp_path / "partial" / f"{PARTS[1]}.part"
    half.parent.mkdir()
    half.write_bytes(b"x" * 1000)
    half.with_name(half.name + ".json").write_text(
        json.dumps({"url": f"{host.url}/{PARTS[1]}", "size": None, "etag": "", "modified": ""})
    )
    fetch(tmp_path, host)
    assert ranges(host, PARTS[1]) == [""]


def test_checksums(host, published, tmp_path):
    right = hashlib.sha256(published[1]["clip_info_final.csv"]).hexdigest()
    files = [
        RemoteFile("clip_info_final.csv", right),
        *(file for file in MTAT_FILES if file.name != "clip_info_final.csv"),
    ]
    fetch(tmp_path / "right", host, files=files)
    files[0] = RemoteFile("clip_info_final.csv", "0" * 64)
    with pytest.raises(
        UserError,
        match=rf"clip_info_final\.csv: what came has the SHA-256 {right}, not the one published, 000",
    ):
        fetch(tmp_path / "wrong", host, files=files)
    assert not list((tmp_path / "wrong").rglob("*clip_info*"))
    # A file that changed on the host is not taken for the one that was noted.
    fetch(tmp_path / "changed", host)
    (tmp_path / "changed" / "clip_info_final.csv").unlink()
    host.files["clip_info_final.csv"] = b"other"
    with pytest.raises(
        UserError,
        match=r"not the one noted on 20\d\d-\d\d-\d\d in .*downloads\.json.*delete that record",
    ):
        fetch(tmp_path / "changed", host)


def test_a_damaged_half_is_found_out_and_comes_again(host, published, tmp_path):
    host.cuts[PARTS[1]] = [200_000, 0, 0, 0]
    files = [
        RemoteFile(f.name, hashlib.sha256(published[1][f.name]).hexdigest(), f.part)
        for f in MTAT_FILES
    ]
    with pytest.raises(UserError, match="gave up"):
        fetch(tmp_path, host, files=files)
    with open(tmp_path / "partial" / f"{PARTS[1]}.part", "r+b") as half:
        half.write(b"damage")
    host.log.clear()
    fetch(tmp_path, host, files=files)
    first, second = ranges(host, PARTS[1])
    assert first and not second
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]


def test_files_that_were_brought_by_hand(host, published, tmp_path):
    (tmp_path / PARTS[0]).write_bytes(published[1][PARTS[0]])
    (tmp_path / PARTS[1]).write_bytes(published[1][PARTS[1]][:1000])
    summary = fetch(tmp_path, host)
    assert (
        summary.verified == (PARTS[0],)
        and PARTS[1] in summary.fetched
        and ranges(host, PARTS[0]) == []
    )
    record = json.loads((tmp_path / "downloads.json").read_text())["files"]
    assert record[PARTS[0]]["sha256"] == hashlib.sha256(published[1][PARTS[0]]).hexdigest()
    (tmp_path / "downloads.json").write_text('{"files": []}')
    with pytest.raises(UserError, match=r"downloads\.json: not a record of downloads"):
        fetch(tmp_path, host)


def test_answers_that_will_not_change_and_those_that_will(host, tmp_path, monkeypatch):
    del host.files["clip_info_final.csv"]
    with pytest.raises(UserError, match=r"clip_info_final\.csv: the host answers 404 .*--base_url"):
        fetch(tmp_path, host)
    assert [entry for entry in host.log if entry[1] == "clip_info_final.csv"] == [
        ("HEAD", "clip_info_final.csv", "")
    ]
    host.files["clip_info_final.csv"] = b"x"
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    host.statuses["clip_info_final.csv"] = [
        405,
        503,
        503,
        500,
    ]  # the first is for HEAD, which not every host knows
    fetch(tmp_path, host, pause=1.0, attempts=4)
    assert waits == [1, 2, 4] and (tmp_path / "clip_info_final.csv").read_bytes() == b"x"
    host.kind = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="sends a web page instead"):
        fetch(tmp_path / "html", host)


def test_hosts_that_cannot_be_reached(host, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        UserError, match=r"annotations_final\.csv: Connection refused; gave up after 3 tries.*go on"
    ):
        download_mtat(tmp_path, f"http://127.0.0.1:{port}", attempts=3, progress=False)
    assert waits == [1, 2]
    for url in ("file:///tmp", "127.0.0.1/mtat", "http:///mtat"):
        with pytest.raises(UserError, match=f"--base_url={url} is not an address such as http"):
            download_mtat(tmp_path, url, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made a folder"):
        fetch(tmp_path / "file", host)


def test_too_small_a_disk_is_found_before_anything_comes(host, published, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    total = sum(map(len, published[1].values()))
    archive = sum(len(published[1][name]) for name in PARTS)
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: usage(total + archive + module.SPARE_BYTES - 1)
    )
    with pytest.raises(
        UserError, match=r"the download needs 1 MiB and 64 to spare, 65 MiB are free\. Make room"
    ):
        fetch(tmp_path, host)
    assert {command for command, _, _ in host.log} == {"HEAD"}
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: usage(total + archive + module.SPARE_BYTES)
    )
    assert len(fetch(tmp_path, host).fetched) == 5


def test_a_disk_that_fills_up_keeps_what_came(host, published, tmp_path, monkeypatch):
    def full(url, response):
        for piece in whole(url, response):
            yield piece
            if url.endswith(PARTS[1]):
                raise OSError(errno.ENOSPC, "No space left on device")

    whole = module._pieces
    monkeypatch.setattr(module, "_pieces", full)
    with pytest.raises(
        UserError,
        match=r"mp3\.zip\.002\.part: cannot be written \(No space left on device\)\. What came is kept",
    ):
        fetch(tmp_path, host)
    monkeypatch.undo()
    host.log.clear()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fetch(tmp_path, host)
    assert ranges(host, PARTS[1]) == [f"bytes={2**16}-"]
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]


def write_archive(path, *members, method=zipfile.ZIP_DEFLATED):
    """Writes a ZIP file of (name or ZipInfo, content) and returns its path."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


GOOD = ("0/a-b-01-c-0-29.mp3", b"sound")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../evil.mp3", b"x")], r"the member '\.\./evil\.mp3' would leave the folder"),
        ([("0/../../evil.mp3", b"x")], "would leave the folder"),
        ([("/etc/evil.mp3", b"x")], "'/etc/evil.mp3' would leave the folder"),
        ([("..\\evil.mp3", b"x")], "would leave the folder"),
        ([("C:evil.mp3", b"x")], "'C:evil.mp3' would leave the folder"),
        (
            [(link("0/a-b-02-c-0-29.mp3"), b"/etc/passwd")],
            r"0/a-b-02-c-0-29\.mp3' is a link or a device",
        ),
        ([("0/A-b-01-c-0-29.mp3", b"x")], "'0/A-b-01-c-0-29.mp3' occurs twice"),
        (
            [("1/a-b-01-c-0-29.mp3", bytes(2**21))],
            "would grow from [0-9,]+ to 2,097,152 bytes, which no sound does",
        ),
        (
            [(f"1/a-b-{i:02d}-c-0-29.mp3", bytes(2**20)) for i in range(3)],
            "would unpack to 3,145,733, more than is allowed",
        ),
    ],
)
def test_an_archive_that_could_do_harm_is_refused_whole(tmp_path, members, message):
    path = write_archive(tmp_path / "a.zip", GOOD, *members)
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UserError, match=message):
        unpack(root, [path], MEMBER, progress=False)
    assert list(root.iterdir()) == [] and sorted(entry.name for entry in tmp_path.iterdir()) == [
        "a.zip",
        "root",
    ]


def test_encrypted_and_strangely_packed_members_are_refused(tmp_path):
    infos = zipfile.ZipFile(write_archive(tmp_path / "a.zip", GOOD)).infolist()
    check_members("a.zip", infos, 200)
    infos[0].flag_bits |= 1
    with pytest.raises(UserError, match="is encrypted"):
        check_members("a.zip", infos, 200)
    infos[0].flag_bits, infos[0].compress_type = 0, zipfile.ZIP_LZMA
    with pytest.raises(UserError, match="is packed by method 14, not stored or deflated"):
        check_members("a.zip", infos, 200)


def test_too_many_and_too_much(tmp_path, monkeypatch):
    path = write_archive(tmp_path / "a.zip", GOOD, ("1/a-b-02-c-0-29.mp3", b"sound"))
    monkeypatch.setattr(module, "MAX_UNPACKED_BYTES", 9)
    with pytest.raises(UserError, match="would unpack to 10, more than is allowed"):
        unpack(tmp_path, [path], MEMBER, progress=False)
    monkeypatch.setattr(module, "MAX_MEMBERS", 1)
    with pytest.raises(UserError, match="2 members, more than the 1"):
        unpack(tmp_path, [path], MEMBER, progress=False)


def test_a_member_with_a_wrong_crc_is_listed_and_the_others_come(tmp_path):
    content = np.random.default_rng(1).bytes(5000)
    members = [(f"0/a-b-{i:02d}-c-0-29.mp3", content) for i in range(3)]
    path = write_archive(
        tmp_path / "a.zip",
        *members,
        ("readme.txt", b"hello"),
        ("0/", b""),
        method=zipfile.ZIP_STORED,
    )
    damaged = bytearray(path.read_bytes())
    damaged[damaged.find(content, damaged.find(content) + 1) + 100] ^= 1
    path.write_bytes(damaged)
    result = unpack(tmp_path, [path], MEMBER, progress=False)
    assert (result.written, result.present, result.left_out) == (2, 0, ("readme.txt",))
    assert (
        list(result.broken) == ["0/a-b-01-c-0-29.mp3"]
        and "Bad CRC-32" in result.broken["0/a-b-01-c-0-29.mp3"]
    )
    assert sorted(entry.name for entry in (tmp_path / "0").iterdir()) == [
        "a-b-00-c-0-29.mp3",
        "a-b-02-c-0-29.mp3",
    ]
    assert not (tmp_path / "readme.txt").exists()


def test_an_archive_with_a_part_missing_or_no_archive_at_all(host, published, tmp_path):
    whole = b"".join(published[1][name] for name in PARTS)
    (tmp_path / "one").write_bytes(whole[:200_000])
    (tmp_path / "two").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"one to two: no ZIP archive that can be read .* delete it and run again"
    ):
        unpack(tmp_path, [tmp_path / "one", tmp_path / "two"], MEMBER, progress=False)
    host.files["annotations_final.csv"] = b"<html>moved</html>"
    with pytest.raises(UserError, match=r"annotations_final\.csv, line 1: no column clip_id"):
        fetch(tmp_path / "mtat", host)
    assert not any(name in PARTS and command == "GET" for command, name, _ in host.log)


def test_damaged_directories_of_archives_are_no_tracebacks(tmp_path):
    path = write_archive(tmp_path / "a.zip", GOOD, method=zipfile.ZIP_STORED)
    whole = path.read_bytes()
    entry, end = whole.find(b"PK\x01\x02"), whole.find(b"PK\x05\x06")
    root = tmp_path / "root"
    root.mkdir()

    def unpack_with(*edits):
        damaged = bytearray(whole)
        for place, content in edits:
            damaged[place : place + len(content)] = content
        path.write_bytes(damaged)
        return unpack(root, [path], MEMBER, progress=False)

    for edits in (
        [(entry, b"XX")],
        [(entry + 6, b"\xff")],  # needs version 25.5 of the format
        [(entry + 9, b"\x08"), (entry + 46, b"\xb8")],  # a name that is said to be UTF-8 and is not
        [(end + 12, b"\xff\xff")],  # a directory longer than the archive
    ):
        with pytest.raises(UserError, match=r"a\.zip: no ZIP archive that can be read"):
            unpack_with(*edits)
    # The directory is said to lie further on than it does, so that the member begins before the archive.
    assert list(unpack_with((end + 16, (end - 10).to_bytes(4, "little"))).broken) == [GOOD[0]]
    assert list(root.iterdir()) == []
    assert unpack_with().written == 1


def test_mp3s_of_the_table_that_the_archive_lacks_are_listed(host, published, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(published[0], tree)
    mp3_paths = read_table(tree).mp3_paths
    (tree / mp3_paths[5]).unlink()
    damaged = bytearray(archive_of(tree))
    damaged[damaged.find(mp3_paths[0].encode()) + 20_000] ^= 255
    for name, content in zip(
        PARTS, (damaged[:1000], damaged[1000:2000], damaged[2000:]), strict=True
    ):
        host.files[name] = bytes(content)
    summary = fetch(tmp_path / "mtat", host)
    assert summary.missing == (mp3_paths[5],) and list(summary.broken) == [
        mp3_paths[0],
        mp3_paths[3],
    ]
    assert summary.broken[mp3_paths[0]].startswith("damaged in the archive (")
    assert summary.lines()[2:4] == [
        "9 of the table's 12 mp3s can be used, 1 are missing, 2 broken.",
        f"  missing {mp3_paths[5]}",
    ]


def test_what_is_broken_at_the_source_is_no_failure(host, tmp_path):
    path = EMPTY_IN_THE_ARCHIVE["35644"]
    host.files["annotations_final.csv"] = (
        f'"clip_id"\t"slow"\t"mp3_path"\n"35644"\t"1"\t"{path}"\n'.encode()
    )
    write_archive(tmp_path / "a.zip", (path, b""))
    for name, content in zip(PARTS, ((tmp_path / "a.zip").read_bytes(), b"", b""), strict=True):
        host.files[name] = content
    summary = fetch(tmp_path / "mtat", host)
    assert summary.complete and (tmp_path / "mtat" / path).stat().st_size == 0
    assert (
        summary.lines()[-1]
        == f"  broken {path}: empty file (0 bytes) (in the published archive, too)"
    )


def test_the_script(host, tmp_path):
    def run(*arguments):
        command = [sys.executable, str(ROOT / "experiments" / "download.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run(
        "--dataset=mtat", f"--root={tmp_path}/mtat", f"--base_url={host.url}", "--noprogress"
    )
    assert done.returncode == 3, done.stderr  # one mp3 is empty that should not be
    assert (
        done.stdout.splitlines()[0]
        == f"{tmp_path}/mtat: 5 files fetched, 0 there already and checked."
    )
    assert done.stderr == ""
    failed = run(f"--root={tmp_path}/other", f"--base_url={host.url}/elsewhere")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "404" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
