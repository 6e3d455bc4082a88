"""Fetches MagnaTagATune from its host: resumes after an interruption, and verifies what it got.

The archive has three parts, which are one ZIP file when concatenated. It is read from the parts:
no joined copy takes up disk space.
"""

import bisect
import contextlib
import datetime
import io
import itertools
import os
import re
import shutil
import struct
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from musicgenre.datasets.mtat import EMPTY_IN_THE_ARCHIVE, read_table
from musicgenre.errors import UserError
from musicgenre.files import read_json, replacing, sha256, write_json

MTAT_URL = "https://mirg.city.ac.uk/datasets/magnatagatune/"
TABLES = ("annotations_final.csv", "clip_info_final.csv")
PARTS = ("mp3.zip.001", "mp3.zip.002", "mp3.zip.003")
# The SHA-256 of each file when it came, so that later runs can verify it; the host publishes none.
RECORD_NAME = "downloads.json"
PARTIAL_FOLDER = "partial"
# An archive that would take more than this, or compresses better than sound can, is refused.
MAX_UNPACKED_BYTES, MAX_RATIO, RATIO_FROM_BYTES = 16 * 2**30, 50, 2**20

# At most this much is lost of what came before a connection broke.
_CHUNK = 2**16
_BYTES: Any = {"unit": "B", "unit_scale": True}
_TIMEOUTS = (20, 60)  # seconds to connect and between two chunks
_LONGEST_PAUSE = 120.0
# Responses after which a later attempt can succeed.
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,
    OSError,
    ValueError,
)
# The members that are unpacked. None can leave the data set's folder, on any system.
_MEMBER = re.compile(r"[0-9a-f]/[^/\\:]+\.mp3")


class Unpacked(NamedTuple):
    """The result of unpacking an archive."""

    written: int  # files written
    present: int  # files that already existed with the right size
    broken: dict[str, str]  # why a member could not be unpacked, by its name


class DownloadSummary(NamedTuple):
    """The result of a run."""

    root: Path
    fetched: list[str]  # files that were fetched
    verified: list[str]  # files that already existed and are intact
    unpacked: Unpacked | None  # None where every mp3 existed and the archive was not needed
    clips: int  # rows of the label table
    missing: list[str]  # mp3s of the table that are not on disk
    broken: dict[str, str]  # why an mp3 of the table cannot be used, by its path

    @property
    def complete(self) -> bool:
        """Whether all mp3s are usable but those that are empty in the published archive."""
        return not self.missing and set(self.broken) <= set(EMPTY_IN_THE_ARCHIVE.values())

    def lines(self) -> list[str]:
        """The summary for people, one line per item."""
        lines = [
            f"{self.root}: {len(self.fetched)} files fetched, {len(self.verified)} already on disk "
            "and verified."
        ]
        if self.unpacked:
            written, present, _ = self.unpacked
            lines.append(f"{written:,} mp3s unpacked, {present:,} already on disk.")
        usable = self.clips - len(self.missing) - len(self.broken)
        lines.append(
            f"{usable:,} of the table's {self.clips:,} mp3s can be used, {len(self.missing):,} are "
            f"missing, {len(self.broken):,} broken."
        )
        known = dict.fromkeys(EMPTY_IN_THE_ARCHIVE.values(), " (in the published archive, too)")
        items = [f"  missing {name}" for name in self.missing]
        items += [
            f"  broken {name}: {why}{known.get(name, '')}" for name, why in self.broken.items()
        ]
        return lines + items[:40] + [f"  ... and {len(items) - 40:,} more"] * (len(items) > 40)


def download_mtat(
    root: str | Path,
    base_url: str = MTAT_URL,
    *,
    attempts: int = 6,
    pause: float = 1.0,
    progress: bool = True,
) -> DownloadSummary:
    """Fetches MagnaTagATune into a folder and unpacks it. The same call resumes an interrupted one.

    Files on disk are verified by the SHA-256 in `downloads.json`, or by their size on the host for
    a copy that came by other means. The archive's parts, once deleted, are fetched again only if an
    mp3 is missing.

    Args:
      root: the folder; created if needed.
      base_url: the folder of the files on the host.
      attempts: further attempts that bring no new byte before giving up.
      pause: seconds between two attempts, doubled each time up to two minutes.
      progress: draw progress bars.

    Raises:
      UserError: the host cannot be reached or lacks a file, a checksum is wrong, the disk is too
        small, or the table or the archive cannot be used. Partial files are kept.
    """
    root = Path(root)
    address = urllib.parse.urlsplit(base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"--base_url={base_url} is not an address such as {MTAT_URL}.")
    try:
        (root / PARTIAL_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--root={root}: cannot be written ({error.strerror}).") from error
    host = _Host(root, base_url.rstrip("/") + "/", attempts, pause, progress)
    unpacked = None
    with host.session:
        fetched, verified = host.fetch(TABLES)
        # A table that cannot be used is found before gigabytes are fetched.
        table = read_table(root)
        parts = [root / name for name in PARTS]
        if all(map(Path.is_file, parts)) or not all((root / p).is_file() for p in table.mp3_paths):
            more, intact = host.fetch(PARTS)
            fetched, verified = fetched + more, verified + intact
            unpacked = unpack(root, parts, progress=progress)
    shutil.rmtree(root / PARTIAL_FOLDER, ignore_errors=True)
    broken, missing = {}, []
    for path in table.mp3_paths:
        if (size := _size(root / path)) == 0:
            broken[path] = "empty file (0 bytes)"
        elif size < 0 and unpacked and path in unpacked.broken:
            broken[path] = unpacked.broken[path]
        elif size < 0:
            missing.append(path)
    return DownloadSummary(root, fetched, verified, unpacked, len(table.mp3_paths), missing, broken)


def unpack(root: Path, parts: Sequence[Path], *, progress: bool = True) -> Unpacked:
    """Unpacks the mp3s in the folders 0-9 and a-f of a ZIP archive, and ignores all other members.

    Every file is written under a temporary name and renamed when its CRC is right. Existing files
    of the right size stay.

    Args:
      root: the folder.
      parts: the parts of the archive in order; an undivided archive is one part.
      progress: draw a progress bar.

    Raises:
      UserError: no ZIP archive, one that takes more space than is free or plausible, or a file
        cannot be written.
    """
    name = str(parts[0]) if len(parts) == 1 else f"{parts[0]} to {parts[-1].name}"
    broken = {}
    with contextlib.closing(io.BufferedReader(_Joined(parts), _CHUNK)) as joined:
        try:
            archive = zipfile.ZipFile(joined)
        except _ZIP_ERRORS as error:
            advice = "Delete the damaged part and run the command again"
            raise UserError(f"{name}: not a ZIP archive ({error}). {advice}.") from error
        wanted = [info for info in archive.infolist() if _MEMBER.fullmatch(info.filename)]
        todo = [info for info in wanted if _size(root / info.filename) != info.file_size]
        total, packed = sum(info.file_size for info in todo), sum(map(_size, parts))
        if total > min(MAX_UNPACKED_BYTES, max(RATIO_FROM_BYTES, MAX_RATIO * packed)):
            raise UserError(f"{name}: would unpack to {total:,} bytes, more than is allowed.")
        if total > (free := shutil.disk_usage(root).free):
            raise UserError(f"{root}: unpacking needs {total:,} bytes, {free:,} are free.")
        hidden = not progress or not todo
        with tqdm(total=total, desc="unpack", disable=hidden, **_BYTES) as bar:
            for info in sorted(todo, key=lambda info: info.header_offset):
                try:
                    path = replacing(root / info.filename)
                    with (
                        archive.open(info) as source,
                        path as temporary,
                        open(temporary, "wb") as out,
                    ):
                        shutil.copyfileobj(source, out, _CHUNK)
                except _ZIP_ERRORS as error:
                    broken[info.filename] = f"damaged in the archive ({error})"
                bar.update(info.file_size)
    return Unpacked(len(todo) - len(broken), len(wanted) - len(todo), broken)


def _size(path: Path) -> int:
    """Returns a file's size in bytes, -1 if it does not exist."""
    return path.stat().st_size if path.is_file() else -1


class _Joined(io.RawIOBase):
    """Several files read as one."""

    def __init__(self, paths: Sequence[Path]):
        self._files = [open(path, "rb") for path in paths]  # noqa: SIM115 (closed by close)
        self._ends = list(itertools.accumulate(map(_size, paths)))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._ends[-1])[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads from the file that holds the position, up to that file's end."""
        number = bisect.bisect_right(self._ends, self._position)
        if number == len(self._files):
            return 0
        begin = self._ends[number - 1] if number else 0
        self._files[number].seek(self._position - begin)
        count = self._files[number].readinto(buffer)
        self._position += count
        return count

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


class _Host:
    """Fetches files from a host with retries; resumes partial files and verifies complete ones."""

    def __init__(self, root: Path, base_url: str, attempts: int, pause: float, progress: bool):
        self._root, self._base_url, self._progress = root, base_url, progress
        self._attempts, self._pause = attempts, pause
        record = root / RECORD_NAME
        self._records = read_json(record)["files"] if record.exists() else {}
        if not isinstance(self._records, dict):
            raise UserError(f"{record}: not a record of downloads. Delete it and run this again.")
        # Connections and responses are tried again by urllib3, broken bodies by `_download`.
        retry = Retry(attempts, status_forcelist=_TRANSIENT, backoff_factor=pause)
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))
        # With a transport encoding, byte ranges would not count the file's bytes.
        self.session.headers.update({"User-Agent": "musicgenre", "Accept-Encoding": "identity"})

    def fetch(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Returns the names of the files that were fetched, and of those that were on disk."""
        todo = [name for name in names if not self._is_intact(name)]
        for name in todo:
            self._fetch(name)
        return todo, [name for name in names if name not in todo]

    def _is_intact(self, name: str) -> bool:
        path = self._root / name
        if not path.is_file():
            return False
        digest = sha256(path)
        if name in self._records:
            return digest == self._records[name]["sha256"]
        # It came by other means. A part of it must not pass for the complete file.
        with self._request("HEAD", self._base_url + name, {}) as response:
            known = response.headers.get("Content-Length") if response.status_code == 200 else None
        if known not in (None, str(_size(path))):
            return False
        self._record(name, digest)
        return True

    def _fetch(self, name: str) -> None:
        part, url = self._root / PARTIAL_FOLDER / f"{name}.part", self._base_url + name
        recorded = self._records.get(name, {})
        try:
            # A wrong checksum may be due to a damaged partial file, so the file is fetched again.
            for _ in range(2):
                self._download(url, part)
                digest = sha256(part)
                if recorded.get("sha256", digest) == digest:
                    break
                part.unlink()
            else:
                raise UserError(
                    f"{url}: not the file recorded on {recorded['when']}. If the host has a new "
                    f"version, delete {self._root / RECORD_NAME}."
                )
            os.replace(part, self._root / name)
        except OSError as error:
            reason = f"cannot be written ({error.strerror or error}). It is kept; free some space"
            raise UserError(f"{part}: {reason} and run the same command again.") from error
        self._record(name, digest)

    def _record(self, name: str, digest: str) -> None:
        self._records[name] = {
            "url": self._base_url + name,
            "size": _size(self._root / name),
            "sha256": digest,
            "when": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        write_json(self._root / RECORD_NAME, {"files": self._records})

    def _download(self, url: str, part: Path) -> None:
        """Completes a partial file in as many attempts as it takes."""
        best, failures = _size(part), 0
        while problem := self._receive(url, part):
            failures = 0 if _size(part) > best else failures + 1
            best = max(best, _size(part))
            if failures > self._attempts:
                raise UserError(
                    f"{url}: {problem}; gave up after {failures} attempts in a row. {best:,} bytes "
                    "are kept. Run the same command again to resume."
                )
            time.sleep(min(self._pause * 2**failures, _LONGEST_PAUSE))

    def _receive(self, url: str, part: Path) -> str:
        """Appends to a partial file what it lacks, or begins it; returns why it is incomplete.

        A note in another file says which version of the remote file it is part of. A host without
        ranges, or whose file has changed since, sends all of it again.
        """
        note = part.with_name(f"{part.name}.version")
        version = note.read_text() if note.is_file() else ""
        have = max(0, _size(part)) if version else 0
        headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
        problem = ""
        with self._request("GET", url, headers) as response:
            fields = response.headers
            if response.status_code == 200:
                if fields.get("Content-Type", "").startswith("text/html"):
                    raise UserError(f"{url}: the host sends a web page instead of the file.")
                have, total = 0, int(fields.get("Content-Length", -1))
                part.unlink(missing_ok=True)
                note.write_text(_version(fields))
            else:
                span = re.fullmatch(r"bytes (\d+)?.*/(\d+)", fields.get("Content-Range", ""))
                total = int(span[2]) if span else -1
                if response.status_code == 416 and total == have:
                    return ""
                if not span or span[1] != str(have) or _version(fields) != version:
                    part.unlink()
                    return "the file on the host has changed since it was begun"
            bar = tqdm(desc=part.stem, initial=have, disable=not self._progress, **_BYTES)
            bar.total = total if total >= 0 else None
            with bar, open(part, "ab", buffering=0) as out:
                try:
                    for chunk in response.iter_content(_CHUNK):
                        out.write(chunk)
                        bar.update(len(chunk))
                except requests.RequestException as error:
                    problem = f"the connection broke ({error})"
        if total in (-1, size := _size(part)):
            return problem
        return problem or f"{size:,} bytes came of {total:,}"

    @contextlib.contextmanager
    def _request(
        self, method: str, url: str, headers: Mapping[str, str]
    ) -> Iterator[requests.Response]:
        """Yields the response, its body unread; raises UserError for a failure that persists."""
        options: Any = {"stream": True, "timeout": _TIMEOUTS, "allow_redirects": True}
        try:
            response = self.session.request(method, url, headers=headers, **options)
        except requests.RequestException as error:
            raise UserError(
                f"{url}: {error}. Check the network and --base_url, and run the same "
                "command again to resume."
            ) from error
        with response:
            # 405 and 501: a host without HEAD. 416: nothing is left of a range.
            if response.status_code >= 400 and response.status_code not in (405, 416, 501):
                raise UserError(
                    f"{url}: the host responds {response.status_code} {response.reason}. Try again "
                    "later, or check whether the data set has moved and set --base_url."
                )
            yield response


def _version(headers: Mapping[str, str]) -> str:
    """Returns what identifies a version of a file for If-Range, "" if the host does not say."""
    # A weak ETag does not promise the same bytes.
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
