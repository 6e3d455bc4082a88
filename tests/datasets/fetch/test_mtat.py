import errno
import hashlib
import io
import json
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mtat_tree import make_mtat_tree

from musicgenre.datasets.fetch import mtat as module
from musicgenre.datasets.fetch.mtat import PARTS, TABLES, download_mtat, unpack
from musicgenre.datasets.mtat import EMPTY_IN_THE_ARCHIVE, load_mtat, read_table
from musicgenre.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
INFO = TABLES[1]


def serve_file(handler):
    """Answers as `server` is told to; every request is noted in `server.log`."""
    server, name = handler.server, handler.path.lstrip("/")
    asked, guard = handler.headers.get("Range", ""), handler.headers.get("If-Range")
    server.log.append((handler.command, name, asked))
    if server.statuses.get(name):
        return handler.answer(server.statuses[name].pop(0))
    if name not in server.files:
        return handler.answer(404)
    data, fields = server.files[name], {"Content-Type": server.content_type}
    etag = f'"{hashlib.md5(data).hexdigest()}"'
    if server.etags:
        fields["ETag"] = etag if server.etags == "strong" else f"W/{etag}"
    if server.modified:
        fields["Last-Modified"] = server.modified
    start, stop, status = 0, len(data), 200
    # As the standard says, a weak tag never matches.
    same = not guard or not server.checks_if_range or guard in (etag, server.modified)
    if server.ranges and asked and same:
        start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
        if start >= len(data):
            return handler.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        stop = min(stop, start + server.longest_range)
        fields["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    cuts = server.cuts.get(name) if handler.command == "GET" else None
    sent = data[start:stop][: cuts.pop(0) if cuts else None]
    server.sent += len(sent) if handler.command == "GET" else 0
    handler.answer(status, sent, fields, length=stop - start)
    if len(sent) < stop - start:
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
    return None


def archive_of(tree):
    """The mp3s of a tree as a ZIP file; its bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(tree.rglob("*.mp3")):
            archive.write(path, path.relative_to(tree))
    return stream.getvalue()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The files of the host: 12 clips of 40,000 random bytes, one empty; the archive in 3 parts."""
    tree = make_mtat_tree(tmp_path_factory.mktemp("published"), clips=12, audio=False)
    generator = np.random.default_rng(0)
    for number, mp3_path in enumerate(read_table(tree).mp3_paths):
        (tree / mp3_path).parent.mkdir(exist_ok=True)
        (tree / mp3_path).write_bytes(generator.bytes(0 if number == 3 else 40_000))
    archive = archive_of(tree)
    # The first part ends inside the first member's name.
    parts = (archive[:33], archive[33:300_001], archive[300_001:])
    files = {TABLES[0]: (tree / TABLES[0]).read_bytes(), INFO: b"clip_id\ttrack\n"}
    return tree, files | dict(zip(PARTS, parts, strict=True))


@pytest.fixture
def host(published, server):
    server.respond = serve_file
    server.files, server.log, server.statuses, server.cuts = dict(published[1]), [], {}, {}
    server.sent, server.longest_range = 0, 2**30
    server.ranges = server.checks_if_range = True
    server.etags, server.modified, server.content_type = "strong", "", "application/octet-stream"
    return server


def fetch(root, host, attempts=2):
    return download_mtat(root, host.address, progress=False, pause=0.0, attempts=attempts)


def ranges(host, name):
    return [asked for command, wanted, asked in host.log if command == "GET" and wanted == name]


def interrupt(root, host, name, length, attempts=2):
    """A run that ends after `length` bytes of a file."""
    host.cuts[name] = [length] + [0] * (attempts + 1)
    with pytest.raises(UserError, match=rf"{name}: the connection broke .*; gave up after"):
        fetch(root, host, attempts)
    host.cuts.clear()
    host.log.clear()
    return root / "partial" / f"{name}.part"


def test_everything_is_fetched_once_and_intact(host, published, tmp_path):
    tree, files = published
    root = tmp_path / "mtat"
    summary = fetch(root, host)
    assert (summary.fetched, summary.verified) == ([*TABLES, *PARTS], [])
    assert summary.unpacked == (12, 0, {})
    mp3s = {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*.mp3")}
    for name, content in (files | mp3s).items():
        assert (root / name).read_bytes() == content
    record = json.loads((root / "downloads.json").read_text())["files"]
    assert record[PARTS[1]]["sha256"] == hashlib.sha256(files[PARTS[1]]).hexdigest()
    assert record[PARTS[1]]["size"] == 300_001 - 33
    empty = read_table(tree).mp3_paths[3]
    assert summary.broken == {empty: "empty file (0 bytes)"}
    assert summary.missing == [] and not summary.complete
    assert summary.lines() == [
        f"{root}: 5 files fetched, 0 already on disk and verified.",
        "12 mp3s unpacked, 0 already on disk.",
        "11 of the table's 12 mp3s can be used, 0 are missing, 1 broken.",
        f"  broken {empty}: empty file (0 bytes)",
    ]
    assert len(load_mtat(root, "all", top_k=5).clips) == 12
    on_disk = sorted(path.name for path in root.iterdir() if path.is_file())
    assert on_disk == sorted([*files, "downloads.json"])
    assert not (root / "partial").exists()


def test_a_second_run_asks_for_nothing_and_repairs_damage(host, published, tmp_path):
    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    fetch(tmp_path, host)
    host.log.clear()
    before = times()
    summary = fetch(tmp_path, host)
    assert host.log == [] and summary.fetched == [] and len(summary.verified) == 5
    assert summary.unpacked == (0, 12, {}) and times() == before

    mp3s = [tmp_path / path for path in read_table(tmp_path).mp3_paths]
    mp3s[0].unlink()
    mp3s[1].write_bytes(b"half")
    (tmp_path / PARTS[2]).write_bytes(b"damaged")
    summary = fetch(tmp_path, host)
    assert summary.fetched == [PARTS[2]] and summary.unpacked == (2, 10, {})
    assert (tmp_path / PARTS[2]).read_bytes() == published[1][PARTS[2]]
    assert mp3s[1].stat().st_size == 40_000

    for name in PARTS:
        (tmp_path / name).unlink()
    host.log.clear()
    summary = fetch(tmp_path, host)
    assert host.log == [] and summary.unpacked is None and summary.missing == []
    mp3s[0].unlink()
    assert fetch(tmp_path, host).fetched == list(PARTS) and mp3s[0].stat().st_size == 40_000


def test_a_broken_connection_is_resumed_where_it_broke(host, published, tmp_path):
    host.cuts[PARTS[1]] = [150_000, 20]
    fetch(tmp_path, host)
    first, second, third = ranges(host, PARTS[1])
    begin, later = (int(r.removeprefix("bytes=").removesuffix("-")) for r in (second, third))
    assert first == "" and 150_000 - 2**16 <= begin <= 150_000 and begin <= later <= begin + 20
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]
    assert host.sent == sum(map(len, host.files.values())) + 150_000 - begin + 20 - later + begin


def test_what_came_is_kept_for_the_next_run(host, published, tmp_path):
    part = interrupt(tmp_path, host, PARTS[1], 200_000).read_bytes()
    assert published[1][PARTS[1]].startswith(part) and len(part) >= 200_000 - 2**16
    assert not (tmp_path / PARTS[1]).exists()
    summary = fetch(tmp_path, host)
    assert ranges(host, PARTS[1]) == [f"bytes={len(part)}-"] and ranges(host, PARTS[0]) == []
    assert summary.fetched == list(PARTS[1:]) and summary.unpacked.broken == {}


def test_a_host_without_ranges_sends_the_file_again(host, published, tmp_path):
    host.ranges = False
    host.cuts[PARTS[1]] = [200_000, 100_000]
    fetch(tmp_path, host)
    assert len(ranges(host, PARTS[1])) == 3 and all(ranges(host, PARTS[1])[1:])
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]
    # Every second attempt gets further than the one before it, but none further than the first.
    host.cuts[PARTS[1]] = [200_000, 100_000] * 5
    with pytest.raises(UserError, match="gave up after 3 attempts in a row"):
        fetch(tmp_path / "again", host)
    assert len(host.cuts[PARTS[1]]) == 6


def test_a_host_that_sends_less_than_the_rest_is_asked_again(host, published, tmp_path):
    host.cuts[PARTS[1]], host.longest_range = [100_000], 50_000
    fetch(tmp_path, host)
    assert len(ranges(host, PARTS[1])) >= 5
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]


def test_a_run_that_stopped_between_the_last_byte_and_the_renaming(host, published, tmp_path):
    interrupt(tmp_path, host, PARTS[1], 100).write_bytes(published[1][PARTS[1]])
    host.sent = 0
    assert PARTS[1] in fetch(tmp_path, host).fetched and host.sent == len(published[1][PARTS[2]])
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]


DATE = "Wed, 21 Oct 2015 07:28:00 GMT"


@pytest.mark.parametrize("checks_if_range", [True, False])
@pytest.mark.parametrize(
    ("etags", "modified"), [("strong", ""), ("weak", DATE), ("", DATE), ("", ""), ("weak", "")]
)
def test_parts_of_two_versions_are_never_joined(host, tmp_path, etags, modified, checks_if_range):
    host.etags, host.modified, host.checks_if_range = etags, modified, checks_if_range
    host.files[INFO] = b"old" * 100_000
    interrupt(tmp_path, host, INFO, 150_000)
    host.files[INFO] = new = b"new" * 100_000
    host.modified = modified.replace("2015", "2016")
    fetch(tmp_path, host)
    assert (tmp_path / INFO).read_bytes() == new
    # Without a version nothing is resumed. A host that obeys If-Range sends the new file at once.
    wanted = [True] if checks_if_range else [True, False]
    if not modified and etags != "strong":
        wanted = [False]
    assert [bool(asked) for asked in ranges(host, INFO)] == wanted


def test_a_partial_file_is_resumed_under_a_weak_tag(host, tmp_path):
    host.etags, host.modified = "weak", DATE
    host.cuts[PARTS[1]] = [200_000]
    fetch(tmp_path, host)
    assert len(ranges(host, PARTS[1])) == 2
    assert 0 <= host.sent - sum(map(len, host.files.values())) <= 2**16


def test_a_file_that_is_not_the_recorded_one(host, published, tmp_path):
    fetch(tmp_path, host)
    (tmp_path / INFO).unlink()
    host.files[INFO] = b"other"
    with pytest.raises(UserError, match=r"recorded on 20\d\d-\d\d-\d\d.*delete .*downloads\.json"):
        fetch(tmp_path, host)
    assert not list(tmp_path.glob(f"{INFO}*"))
    # A damaged partial file is fetched again.
    (tmp_path / PARTS[1]).unlink()
    (tmp_path / read_table(tmp_path).mp3_paths[0]).unlink()
    host.files[INFO] = published[1][INFO]
    with open(interrupt(tmp_path, host, PARTS[1], 200_000), "r+b") as part:
        part.write(b"damage")
    fetch(tmp_path, host)
    first, second = ranges(host, PARTS[1])
    assert first and not second
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]


def test_files_that_came_by_other_means(host, published, tmp_path):
    (tmp_path / PARTS[0]).write_bytes(published[1][PARTS[0]])
    (tmp_path / PARTS[1]).write_bytes(published[1][PARTS[1]][:1000])
    summary = fetch(tmp_path, host)
    assert summary.verified == [PARTS[0]] and PARTS[1] in summary.fetched
    assert ranges(host, PARTS[0]) == []
    record = json.loads((tmp_path / "downloads.json").read_text())["files"]
    assert record[PARTS[0]]["sha256"] == hashlib.sha256(published[1][PARTS[0]]).hexdigest()
    (tmp_path / "downloads.json").write_text('{"files": []}')
    with pytest.raises(UserError, match=r"downloads\.json: not a record of downloads"):
        fetch(tmp_path, host)


def test_responses_that_persist_and_those_that_may_not(host, tmp_path, monkeypatch):
    del host.files[INFO]
    with pytest.raises(UserError, match=r"info_final\.csv: the host responds 404 .*--base_url"):
        fetch(tmp_path, host)
    assert [entry for entry in host.log if entry[1] == INFO] == [("GET", INFO, "")]
    host.files[INFO], host.statuses[INFO] = b"x", [503, 429, 500]
    with pytest.raises(UserError, match=r"clip_info_final\.csv: .*too many 500 error responses"):
        fetch(tmp_path, host, attempts=2)
    host.statuses[INFO] = [503, 500]
    fetch(tmp_path, host, attempts=2)
    assert (tmp_path / INFO).read_bytes() == b"x"
    # A host without HEAD.
    (tmp_path / "downloads.json").unlink()
    host.statuses[INFO] = [405]
    assert INFO in fetch(tmp_path, host).verified
    host.content_type = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="sends a web page instead"):
        fetch(tmp_path / "html", host)


def test_hosts_that_cannot_be_reached(host, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=r"annotations_final\.csv: .*Connection refused.*to resume"):
        download_mtat(tmp_path, url, attempts=2, pause=0.0, progress=False)
    for url in ("file:///tmp", "127.0.0.1/mtat", "http:///mtat"):
        with pytest.raises(UserError, match=f"--base_url={url} is not an address such as http"):
            download_mtat(tmp_path, url, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        fetch(tmp_path / "file", host)


def test_a_disk_that_fills_up_keeps_what_came(host, published, tmp_path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() >= 2**16:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def opened(path, mode="r", **options):
        full = mode == "ab" and PARTS[1] in str(path)
        return FullDisk(path, mode) if full else open(path, mode, **options)

    monkeypatch.setattr(module, "open", opened, raising=False)
    with pytest.raises(UserError, match=r"zip\.002\.part: .* \(No space left on device\).* kept"):
        fetch(tmp_path, host)
    monkeypatch.delattr(module, "open")
    host.log.clear()
    fetch(tmp_path, host)
    assert ranges(host, PARTS[1]) == [f"bytes={2**16}-"]
    assert (tmp_path / PARTS[1]).read_bytes() == published[1][PARTS[1]]


def write_archive(path, *members, method=zipfile.ZIP_DEFLATED):
    """Writes a ZIP file of (name or ZipInfo, content) and returns its path."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


GOOD = ("0/a-b-01-c-0-29.mp3", b"sound")


def test_members_that_would_leave_the_folder_are_ignored(tmp_path):
    names = (
        "../x.mp3",
        "0/../../x.mp3",
        "/etc/x.mp3",
        "0//x.mp3",
        "./x.mp3",
        "0/..\\x.mp3",
        "0/C:x.mp3",
    )
    path = write_archive(tmp_path / "a.zip", *((name, b"x") for name in names), GOOD)
    root = tmp_path / "root"
    root.mkdir()
    assert unpack(root, [path], progress=False) == (1, 0, {})
    assert sorted(tmp_path.rglob("*")) == [path, root, root / "0", root / GOOD[0]]


def test_archives_that_would_take_too_much_space(tmp_path, monkeypatch):
    zeros = ("1/a-b-02-c-0-29.mp3", bytes(3 * 2**20))
    path = write_archive(tmp_path / "a.zip", GOOD, zeros)
    with pytest.raises(UserError, match="would unpack to 3,145,733 bytes, more than is allowed"):
        unpack(tmp_path, [path], progress=False)
    path = write_archive(tmp_path / "a.zip", GOOD)
    monkeypatch.setattr(module, "MAX_UNPACKED_BYTES", 4)
    with pytest.raises(UserError, match="would unpack to 5 bytes, more than is allowed"):
        unpack(tmp_path, [path], progress=False)
    monkeypatch.undo()
    usage = shutil._ntuple_diskusage(10, 6, 4)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="unpacking needs 5 bytes, 4 are free"):
        unpack(tmp_path, [path], progress=False)


def test_a_damaged_member_is_listed_and_the_others_are_unpacked(tmp_path):
    content = np.random.default_rng(1).bytes(5000)
    members = [(f"0/a-b-{i:02d}-c-0-29.mp3", content) for i in range(3)]
    others = (("readme.txt", b"hello"), ("0/", b""))
    path = write_archive(tmp_path / "a.zip", *members, *others, method=zipfile.ZIP_STORED)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.find(content, damaged.find(content) + 1) + 100] ^= 1
    path.write_bytes(damaged)
    written, present, broken = unpack(tmp_path, [path], progress=False)
    assert (written, present, list(broken)) == (2, 0, ["0/a-b-01-c-0-29.mp3"])
    assert "Bad CRC-32" in broken["0/a-b-01-c-0-29.mp3"]
    names = sorted(entry.name for entry in (tmp_path / "0").iterdir())
    assert names == ["a-b-00-c-0-29.mp3", "a-b-02-c-0-29.mp3"]
    assert not (tmp_path / "readme.txt").exists()


def test_an_archive_with_a_part_missing_or_no_archive_at_all(host, published, tmp_path):
    archive = b"".join(published[1][name] for name in PARTS)
    (tmp_path / "one").write_bytes(archive[:200_000])
    (tmp_path / "two").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"one to two: not a ZIP archive \(.*\)\. Delete the damaged part"
    ):
        unpack(tmp_path, [tmp_path / "one", tmp_path / "two"], progress=False)
    host.files[TABLES[0]] = b"<html>moved</html>"
    with pytest.raises(UserError, match=r"annotations_final\.csv, line 1: no column clip_id"):
        fetch(tmp_path / "mtat", host)
    assert not any(name in PARTS for _, name, _ in host.log)


@pytest.mark.parametrize(
    "edits",
    [
        [("entry", 0, b"XX")],
        [("entry", 6, b"\xff")],  # needs version 25.5 of the format
        [("entry", 9, b"\x08"), ("entry", 46, b"\xb8")],  # a name that should be UTF-8 and is not
        [("end", 12, b"\xff\xff")],  # a directory longer than the archive
        [("end", 16, None)],  # a directory further on, so that the member begins before the archive
        [("entry", 8, b"\x01")],  # an encrypted member
        [("entry", 10, b"\x63")],  # an unknown compression
    ],
)
def test_damaged_directories_of_archives_are_clear_errors(tmp_path, edits):
    path = write_archive(tmp_path / "a.zip", GOOD, method=zipfile.ZIP_STORED)
    damaged = bytearray(path.read_bytes())
    begin = {"entry": damaged.find(b"PK\x01\x02"), "end": damaged.find(b"PK\x05\x06")}
    for where, offset, content in edits:
        content = content or (begin["end"] - 10).to_bytes(4, "little")
        damaged[begin[where] + offset : begin[where] + offset + len(content)] = content
    path.write_bytes(damaged)
    root = tmp_path / "root"
    root.mkdir()
    if edits[0][:2] in (("end", 16), ("entry", 8), ("entry", 10)):
        assert list(unpack(root, [path], progress=False).broken) == [GOOD[0]]
    else:
        with pytest.raises(UserError, match=r"a\.zip: not a ZIP archive \("):
            unpack(root, [path], progress=False)
    assert not list(root.rglob("*.mp3"))


def test_mp3s_of_the_table_that_the_archive_lacks_are_listed(host, published, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(published[0], tree)
    mp3_paths = read_table(tree).mp3_paths
    (tree / mp3_paths[5]).unlink()
    damaged = bytearray(archive_of(tree))
    damaged[damaged.find(mp3_paths[0].encode()) + 20_000] ^= 255
    contents = (damaged[:1000], damaged[1000:2000], damaged[2000:])
    host.files |= {name: bytes(part) for name, part in zip(PARTS, contents, strict=True)}
    summary = fetch(tmp_path / "mtat", host)
    assert summary.missing == [mp3_paths[5]]
    assert list(summary.broken) == [mp3_paths[0], mp3_paths[3]]
    assert summary.broken[mp3_paths[0]].startswith("damaged in the archive (")
    assert summary.lines()[2:4] == [
        "9 of the table's 12 mp3s can be used, 1 are missing, 2 broken.",
        f"  missing {mp3_paths[5]}",
    ]


def test_what_is_broken_at_the_source_is_no_failure(host, tmp_path):
    path = EMPTY_IN_THE_ARCHIVE["35644"]
    host.files[TABLES[0]] = f'"clip_id"\t"slow"\t"mp3_path"\n"35644"\t"1"\t"{path}"\n'.encode()
    archive = write_archive(tmp_path / "a.zip", (path, b"")).read_bytes()
    host.files |= dict(zip(PARTS, (archive, b"", b""), strict=True))
    summary = fetch(tmp_path / "mtat", host)
    assert summary.complete and (tmp_path / "mtat" / path).stat().st_size == 0
    wanted = f"  broken {path}: empty file (0 bytes) (in the published archive, too)"
    assert summary.lines()[-1] == wanted


def test_the_script(host, tmp_path):
    def run(*arguments):
        command = [sys.executable, str(ROOT / "experiments" / "download.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    root = tmp_path / "mtat"
    done = run("--dataset=mtat", f"--root={root}", f"--base_url={host.address}", "--noprogress")
    assert done.returncode == 3, done.stderr  # one mp3 is empty that should not be
    first = done.stdout.splitlines()[0]
    assert first == f"{root}: 5 files fetched, 0 already on disk and verified."
    assert done.stderr == ""
    failed = run(f"--root={tmp_path}/other", f"--base_url={host.address}/elsewhere")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "404" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
