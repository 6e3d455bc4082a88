"""Fetches a data set from its own host: goes on where it was stopped, checks what came, unpacks nothing that is not sound.

Only MagnaTagATune so far. Its archive comes in three parts that are one ZIP file when laid end to end; it is read from the parts
as they are, so that no joined copy takes up the disk.
"""

import bisect
import contextlib
import dataclasses
import datetime
import io
import itertools
import os
import re
import shutil
import stat
import struct
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pooch
import requests
from absl import logging
from tqdm import tqdm

from musicgenre.datasets.mtat import EMPTY_IN_THE_ARCHIVE, read_table
from musicgenre.errors import UserError
from musicgenre.files import read_json, replacing, sha256, write_json

MTAT_URL = "https://mirg.city.ac.uk/datasets/magnatagatune/"
# What each file was when it came, so that later runs can tell whether it still is the same.
RECORD_NAME = "downloads.json"
# Where the first half of a file waits for the second.
PARTIAL_FOLDER = "partial"
# An archive is refused before it is unpacked if it would take more than this, or if it shrank more than any sound does.
MAX_UNPACKED_BYTES = 16 * 2**30
MAX_MEMBERS = 200_000
MAX_RATIO = 50
# Small members may shrink as they like: a few repeated bytes are no bomb.
RATIO_FROM_BYTES = 2**20
# Left free for other programs.
SPARE_BYTES = 64 * 2**20

# At most this much is lost of what came before a connection broke.
_CHUNK = 2**16
_TIMEOUTS = (20, 60)  # seconds to connect and between two pieces
_LONGEST_PAUSE = 60.0
# Answers after which a later try can succeed.
_TRANSIENT_ANSWERS = (408, 425, 429, 500, 502, 503, 504)
_MTAT_MEMBER = re.compile(r"[0-9a-f]/[^/]+\.mp3")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a data set.

    Attributes:
      name: on the host below its base URL, and in the data set's folder.
      sha256: in hexadecimal; "" where none is published.
      part: whether it is a part of the archive; the parts follow each other in order.
    """

    name: str
    sha256: str = ""
    part: bool = False


# The host publishes no checksums.
MTAT_FILES = (
    RemoteFile("annotations_final.csv"),
    RemoteFile("clip_info_final.csv"),
    RemoteFile("mp3.zip.001", part=True),
    RemoteFile("mp3.zip.002", part=True),
    RemoteFile("mp3.zip.003", part=True),
)


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """What became of an archive's members.

    Attributes:
      written: number of files written.
      present: number of files that were there already, with the right size.
      left_out: members that are no sound files of the data set.
      broken: why a member could not be unpacked, by its name.
    """

    written: int
    present: int
    left_out: tuple[str, ...]
    broken: dict[str, str]


@dataclasses.dataclass(frozen=True)
class DownloadSummary:
    """What a run did.

    Attributes:
      root: the data set's folder.
      fetched: names of the files that came now.
      verified: names of those that were there and are what they should be.
      unpacked: what became of the archive; None where every mp3 was there and the archive was not needed.
      clips: number of clips in the label table.
      missing: mp3s of the table that are not on disk.
      broken: why an mp3 of the table cannot be used, by its path; those that are empty in the published archive are among them.
    """

    root: Path
    fetched: tuple[str, ...]
    verified: tuple[str, ...]
    unpacked: Unpacked | None
    clips: int
    missing: tuple[str, ...]
    broken: dict[str, str]

    @property
    def complete(self) -> bool:
        """True where all is there but what the published archive itself lacks."""
        return not self.missing and set(self.broken) <= set(EMPTY_IN_THE_ARCHIVE.values())

    def lines(self) -> list[str]:
        """The summary for people, one line an item."""
        lines = [
            f"{self.root}: {len(self.fetched)} files fetched, {len(self.verified)} there already and checked."
        ]
        if self.unpacked:
            lines.append(
                f"{self.unpacked.written:,} mp3s unpacked, {self.unpacked.present:,} there already."
            )
            if left_out := self.unpacked.left_out:
                lines.append(
                    f"{len(left_out):,} members of the archive are not of the data set and were left: {left_out[0]} ..."
                )
        usable = self.clips - len(self.missing) - len(self.broken)
        lines.append(
            f"{usable:,} of the table's {self.clips:,} mp3s can be used, {len(self.missing):,} are missing, "
            f"{len(self.broken):,} broken."
        )
        items = [f"  missing {name}" for name in self.missing]
        for name, reason in self.broken.items():
            known = (
                " (in the published archive, too)" if name in EMPTY_IN_THE_ARCHIVE.values() else ""
            )
            items.append(f"  broken {name}: {reason}{known}")
        lines += items[:40]
        if len(items) > 40:
            lines.append(f"  ... and {len(items) - 40:,} more")
        return lines


def download_mtat(
    root: str | Path,
    base_url: str = MTAT_URL,
    *,
    files: Sequence[RemoteFile] = MTAT_FILES,
    attempts: int = 6,
    pause: float = 1.0,
    progress: bool = True,
) -> DownloadSummary:
    """Fetches MagnaTagATune into a folder and unpacks it. The same call goes on where an earlier one was stopped.

    What is there is not fetched again but checked: by its SHA-256 where one is published or `downloads.json` has noted it,
    otherwise by its size on the host. The archive's parts are kept. Once deleted, they come again only if an mp3 is missing.

    Args:
      root: the folder; made where it does not exist.
      base_url: where the files are.
      files: the files, the label table among them.
      attempts: tries in a row that bring not a byte more, until it gives up.
      pause: seconds from one try to the next, doubled each time up to a minute.
      progress: draw progress bars.

    Raises:
      UserError: the host cannot be reached or has no such file, a checksum is wrong, the disk is too small, or the table or the
        archive cannot be used. What came so far is kept, but for a file with a wrong checksum.
    """
    root = Path(root)
    address = urllib.parse.urlsplit(base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"--base_url={base_url} is not an address such as {MTAT_URL}.")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{root}: cannot be made a folder ({error.strerror}). Choose another --root."
        ) from error
    host = _Host(base_url if base_url.endswith("/") else base_url + "/", attempts, pause, progress)
    parts = [file for file in files if file.part]
    unpacked = None
    with contextlib.closing(host.session):
        fetched, verified = _fetch_all(root, [file for file in files if not file.part], host, parts)
        # A table that is no table is found before gigabytes have come.
        table = read_table(root)
        if all((root / part.name).is_file() for part in parts) or not all(
            (root / path).is_file() for path in table.mp3_paths
        ):
            more, same = _fetch_all(root, parts, host, ())
            fetched, verified = fetched + more, verified + same
            unpacked = unpack(
                root, [root / part.name for part in parts], _MTAT_MEMBER, progress=progress
            )
    shutil.rmtree(root / PARTIAL_FOLDER, ignore_errors=True)
    broken, missing = {}, []
    for path in table.mp3_paths:
        if (root / path).is_file():
            if not (root / path).stat().st_size:
                broken[path] = "empty file (0 bytes)"
        elif unpacked and path in unpacked.broken:
            broken[path] = unpacked.broken[path]
        else:
            missing.append(path)
    return DownloadSummary(
        root,
        tuple(fetched),
        tuple(verified),
        unpacked,
        len(table.mp3_paths),
        tuple(missing),
        broken,
    )


def unpack(
    root: str | Path, parts: Sequence[Path], members: re.Pattern[str], *, progress: bool = True
) -> Unpacked:
    """Unpacks the sound files of a ZIP archive that is cut into parts; checks the whole of it before the first is written.

    Every file is written under another name and renamed when its CRC is right. Files that are there with the right size stay.

    Args:
      root: the folder.
      parts: the archive, cut anywhere; a whole archive is one part.
      members: the names that belong to the data set; others are left.
      progress: draw a progress bar.

    Raises:
      UserError: no ZIP archive; a name that leaves the folder, a link, an encrypted or a doubled member; one that takes more
        space than is free or than is plausible; or a file cannot be written.
    """
    root = Path(root)
    name = str(parts[0]) if len(parts) == 1 else f"{parts[0]} to {parts[-1].name}"
    broken = {}
    with _archive(name, parts) as archive:
        infos = archive.infolist()
        check_members(name, infos, sum(part.stat().st_size for part in parts))
        wanted = sorted(
            (info for info in infos if members.fullmatch(info.filename)),
            key=lambda info: info.header_offset,
        )
        todo = [info for info in wanted if _size(root / info.filename) != info.file_size]
        total = sum(info.file_size for info in todo)
        _check_space(root, total, "unpacking")
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="unpack", disable=not progress or not todo
        ) as bar:
            for info in todo:
                try:
                    _unpack_member(archive, info, root / info.filename)
                except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                    broken[info.filename] = f"damaged in the archive ({error})"
                bar.update(info.file_size)
    left_out = tuple(
        info.filename
        for info in infos
        if not info.is_dir() and not members.fullmatch(info.filename)
    )
    return Unpacked(len(todo) - len(broken), len(wanted) - len(todo), left_out, broken)


@contextlib.contextmanager
def _archive(name: str, parts: Sequence[Path]) -> Iterator[zipfile.ZipFile]:
    """Opens an archive that is cut into parts.

    Raises:
      UserError: it cannot be read.
    """
    with contextlib.closing(io.BufferedReader(_Joined(parts), _CHUNK)) as joined:
        try:
            archive = zipfile.ZipFile(joined)
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            OSError,
            ValueError,
            struct.error,
        ) as error:
            raise UserError(
                f"{name}: no ZIP archive that can be read ({error}). If a part is damaged or missing, delete it and run again."
            ) from error
        with archive:
            yield archive


def _unpack_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    try:
        source = archive.open(info)
    except (OSError, ValueError) as error:
        # A member that is said to begin before the archive does, or whose name is no text.
        raise zipfile.BadZipFile(str(error)) from error
    with source, replacing(path) as temporary, open(temporary, "wb") as out:
        shutil.copyfileobj(source, out, _CHUNK)


def check_members(name: str, infos: Sequence[zipfile.ZipInfo], archive_bytes: int) -> None:
    """Refuses an archive that could do harm: the names, kinds and sizes of its members are looked at, nothing is unpacked.

    Args:
      name: the archive, for the message.
      infos: its members.
      archive_bytes: its own size.

    Raises:
      UserError: naming the member and what is wrong with it.
    """
    if len(infos) > MAX_MEMBERS:
        raise UserError(
            f"{name}: {len(infos):,} members, more than the {MAX_MEMBERS:,} that are allowed."
        )
    seen: set[str] = set()
    total = 0
    for info in infos:
        # zipfile cuts a name at a zero byte; what was written is in orig_filename.
        given = info.orig_filename
        pieces = given.removesuffix("/").split("/")
        if (
            "\\" in given
            or "\0" in given
            or re.match("[A-Za-z]:", given)
            or any(piece in ("", ".", "..") for piece in pieces)
        ):
            raise UserError(
                f"{name}: the member {given!r} would leave the folder; nothing was unpacked."
            )
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(
                f"{name}: the member {given!r} is a link or a device, no file; nothing was unpacked."
            )
        if info.flag_bits & 1:
            raise UserError(f"{name}: the member {given!r} is encrypted; nothing was unpacked.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{name}: the member {given!r} is packed by method {info.compress_type}, not stored or deflated."
            )
        if given.casefold() in seen:
            raise UserError(f"{name}: the member {given!r} occurs twice; nothing was unpacked.")
        if info.file_size > RATIO_FROM_BYTES and info.file_size > MAX_RATIO * info.compress_size:
            raise UserError(
                f"{name}: the member {given!r} would grow from {info.compress_size:,} to {info.file_size:,} bytes, which no "
                "sound does; nothing was unpacked."
            )
        seen.add(given.casefold())
        total += info.file_size
    if total > MAX_UNPACKED_BYTES or (
        total > RATIO_FROM_BYTES and total > MAX_RATIO * archive_bytes
    ):
        raise UserError(
            f"{name}: its {archive_bytes:,} bytes would unpack to {total:,}, more than is allowed."
        )


def _fetch_all(
    root: Path, files: Sequence[RemoteFile], host: "_Host", later: Sequence[RemoteFile]
) -> tuple[list[str], list[str]]:
    """Brings the files, after looking whether there is room for them, for `later` ones and for what the archive unpacks to.

    Returns:
      The names of those that were fetched, and of those that were there.
    """
    records = _read_records(root)
    todo = [file for file in files if not _is_there(root, file, records, host)]
    if todo:
        coming = [*todo, *(file for file in later if not (root / file.name).exists())]
        sizes = {file: host.probe(file.name) or 0 for file in coming}
        needed = sum(size - max(0, _size(_partial(root, file))) for file, size in sizes.items())
        if any(file.part for file in coming):
            # mp3s hardly shrink in an archive, so they take as much again as its parts.
            unpacked = sum(_size(path) for path in root.glob("[0-9a-f]/*.mp3"))
            needed += max(0, sum(size for file, size in sizes.items() if file.part) - unpacked)
        _check_space(root, needed, "the download")
    for file in todo:
        records[file.name] = _fetch(root, file, host, records.get(file.name, {}))
        write_json(root / RECORD_NAME, {"files": records})
    return [file.name for file in todo], [file.name for file in files if file not in todo]


def _is_there(
    root: Path, file: RemoteFile, records: dict[str, dict[str, Any]], host: "_Host"
) -> bool:
    """Whether a file is on disk and what it should be; one that was not noted so far is noted."""
    path = root / file.name
    if not path.is_file():
        return False
    digest = sha256(path)
    if expected := file.sha256 or records.get(file.name, {}).get("sha256"):
        return digest == expected
    # It was brought by other means. A half of it must not pass for the whole.
    if host.probe(file.name) not in (None, _size(path)):
        return False
    records[file.name] = _record(host.base_url + file.name, path, digest)
    write_json(root / RECORD_NAME, {"files": records})
    return True


def _fetch(
    root: Path, file: RemoteFile, host: "_Host", record: Mapping[str, Any]
) -> dict[str, Any]:
    """Brings one file and returns what is to be noted of it."""
    url, place = host.base_url + file.name, root / PARTIAL_FOLDER / file.name
    expected = file.sha256 or record.get("sha256", "")
    pooch.get_logger().setLevel(
        "WARNING"
    )  # its lines on every file would cut through the progress bar
    for last in (False, True):
        downloader = _Downloader(host, _partial(root, file))
        try:
            pooch.retrieve(
                url,
                f"sha256:{expected}" if expected else None,
                place.name,
                place.parent,
                downloader=downloader,
            )
            os.replace(place, root / file.name)
            break
        except ValueError as error:
            # Where it was put together from pieces, a piece may be at fault: once more, in one go.
            if downloader.resumed and not last:
                continue
            noted = (
                f"published, {expected}"
                if file.sha256
                else f"noted on {record['when']} in {root / RECORD_NAME}, {expected}"
            )
            advice = (
                "Try again later."
                if file.sha256
                else "If the host has a new version, delete that record and run again."
            )
            raise UserError(
                f"{url}: what came has the SHA-256 {downloader.digest}, not the one {noted}. It was deleted. {advice}"
            ) from error
        except OSError as error:
            raise UserError(
                f"{root / file.name}: cannot be written ({error.strerror or error})."
            ) from error
    return _record(url, root / file.name, downloader.digest or sha256(root / file.name))


def _partial(root: Path, file: RemoteFile) -> Path:
    return root / PARTIAL_FOLDER / f"{file.name}.part"


def _record(url: str, path: Path, digest: str) -> dict[str, Any]:
    when = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"url": url, "size": path.stat().st_size, "sha256": digest, "when": when}


def _read_records(root: Path) -> dict[str, dict[str, Any]]:
    """Returns what is noted of each file."""
    path = root / RECORD_NAME
    if not path.exists():
        return {}
    found = read_json(path, "record of downloads")
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"sha256", "when"} <= entry.keys() for entry in files.values()
    ):
        raise UserError(f"{path}: not a record of downloads. Delete it and run again.")
    return files


def _check_space(root: Path, needed: int, purpose: str) -> None:
    free = shutil.disk_usage(root).free
    if needed > 0 and needed + SPARE_BYTES > free:
        raise UserError(
            f"{root}: {purpose} needs {needed / 2**20:,.0f} MiB and {SPARE_BYTES / 2**20:,.0f} to spare, {free / 2**20:,.0f} MiB "
            "are free. Make room or choose another --root."
        )


def _size(path: Path) -> int:
    """Returns a file's size in bytes, -1 where there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


class _Joined(io.RawIOBase):
    """Several files read as one, end to end."""

    def __init__(self, paths: Sequence[Path]):
        self._files = [open(path, "rb") for path in paths]  # noqa: SIM115 (closed by close)
        self._ends = list(itertools.accumulate(path.stat().st_size for path in paths))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (
            offset
            + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}[whence]
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads from the one file that holds the position; what is asked for beyond its end comes with the next call."""
        number = bisect.bisect_right(self._ends, self._position)
        if number == len(self._files):
            return 0
        file, begin = self._files[number], self._ends[number - 1] if number else 0
        file.seek(self._position - begin)
        count = file.readinto(buffer)
        self._position += count
        return count

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


class _Transient(Exception):
    """A failure that a later try may not have. `wait` is how long the host asks to be left alone, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Host:
    """Where the files are, and the patience to get them.

    Attributes:
      base_url: ends with a slash.
      session: keeps the connection open from one file to the next.
    """

    def __init__(self, base_url: str, attempts: int, pause: float, progress: bool):
        self.base_url = base_url
        self.session = requests.Session()
        # A transport encoding would make byte ranges count something else than the file's bytes.
        self.session.headers.update({"User-Agent": "musicgenre", "Accept-Encoding": "identity"})
        self.progress = progress
        self._attempts = attempts
        self._pause = pause

    def probe(self, name: str) -> int | None:
        """Returns a file's size in bytes, None where the host does not say.

        Raises:
          UserError: there is no such file, or the host cannot be reached.
        """
        url = self.base_url + name

        def ask() -> int | None:
            with self.open("HEAD", url, {}, allowed=(200, 405, 501)) as response:
                length = response.headers.get("Content-Length", "")
                return int(length) if response.status_code == 200 and length.isdigit() else None

        return self.persist(url, ask, lambda: 0)

    def persist(
        self, url: str, attempt: Callable[[], Result], progress: Callable[[], int]
    ) -> Result:
        """Calls `attempt` until it gets through; gives up when several in a row have not moved `progress`.

        Raises:
          UserError: it was given up.
        """
        best, failures = progress(), 0
        while True:
            try:
                return attempt()
            except _Transient as problem:
                failures = 0 if progress() > best else failures + 1
                best = max(best, progress())
                if failures >= self._attempts:
                    kept = f" {best:,} bytes are kept." if best > 0 else ""
                    raise UserError(
                        f"{url}: {problem}; gave up after {failures} tries in a row.{kept} Run the same command again to go on."
                    ) from problem
                wait = min(
                    max(problem.wait, self._pause * 2 ** max(failures - 1, 0)), _LONGEST_PAUSE
                )
                logging.warning("%s: %s; trying again in %.0f s", url, problem, wait)
                time.sleep(wait)

    @contextlib.contextmanager
    def open(
        self, method: str, url: str, headers: Mapping[str, str], allowed: Sequence[int]
    ) -> Iterator[requests.Response]:
        """Yields the host's answer, its body not yet read.

        Raises:
          _Transient: no answer, or one that says to try later.
          UserError: an answer that will not change, such as 404.
        """
        with _network(url):
            response = self.session.request(
                method, url, headers=headers, stream=True, timeout=_TIMEOUTS
            )
        with contextlib.closing(response):
            code = response.status_code
            if code in _TRANSIENT_ANSWERS:
                asked = response.headers.get("Retry-After", "")
                raise _Transient(
                    f"the host answers {code} {response.reason}",
                    float(asked) if asked.isdigit() else 0.0,
                )
            if code not in allowed:
                raise UserError(
                    f"{url}: the host answers {code} {response.reason}. See whether the data set has moved; another place is "
                    "given with --base_url."
                )
            yield response


@contextlib.contextmanager
def _network(url: str) -> Iterator[None]:
    """Turns what the HTTP library raises into failures that pass and failures that do not."""
    try:
        yield
    except requests.exceptions.SSLError as error:
        raise UserError(
            f"{url}: the host's certificate was not accepted ({_reason(error)})."
        ) from error
    except (
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
        requests.exceptions.InvalidURL,
        requests.exceptions.TooManyRedirects,
    ) as error:
        raise UserError(
            f"{url}: cannot be opened ({_reason(error)}). Is --base_url right?"
        ) from error
    except requests.exceptions.Timeout as error:
        raise _Transient("the host does not answer in time") from error
    except requests.exceptions.ChunkedEncodingError as error:
        raise _Transient("the connection broke") from error
    except requests.exceptions.RequestException as error:
        raise _Transient(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """Returns the operating system's word for an error that others are wrapped around, such as "Connection refused"."""
    inner: BaseException | None = error
    while inner is not None:
        if (
            isinstance(inner, OSError)
            and inner.strerror
            and not isinstance(inner, requests.exceptions.RequestException)
        ):
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return " ".join(str(error).split())[:200]


@dataclasses.dataclass(frozen=True)
class _Version:
    """What tells one state of a remote file from another: its address, size (None: not known), ETag and time of change."""

    url: str
    size: int | None
    etag: str
    modified: str

    def differs(self, other: "_Version") -> bool:
        """Whether anything that both know is not the same."""
        pairs = ((self.size, other.size), (self.etag, other.etag), (self.modified, other.modified))
        return self.url != other.url or any(one and two and one != two for one, two in pairs)


class _Downloader:
    """A downloader for pooch that goes on with a half file.

    The half lies in `part`, and beside it a note of which state of the remote file it is a half of. A host that does not know
    ranges, or whose file has changed since, sends the whole again.

    Attributes:
      resumed: whether the file was put together from pieces.
      digest: SHA-256 of the finished file.
    """

    def __init__(self, host: _Host, part: Path):
        self.resumed = False
        self.digest = ""
        self._host = host
        self._part = part
        self._note = part.with_name(part.name + ".json")

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Brings `url` to `output_file`."""
        self._host.persist(url, lambda: self._attempt(url), lambda: max(0, _size(self._part)))
        self.digest = sha256(self._part)
        os.replace(self._part, output_file)
        self._note.unlink(missing_ok=True)

    def _attempt(self, url: str) -> None:
        have, begun = self._begun(url)
        self.resumed = self.resumed or have > 0
        if have and begun.size == have:
            return
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            # A weak ETag does not promise the same bytes, so it cannot guard a range.
            if guard := ("" if begun.etag.startswith("W/") else begun.etag) or begun.modified:
                headers["If-Range"] = guard
        with self._host.open("GET", url, headers, allowed=(200, 206, 416)) as response:
            if response.status_code == 200:
                begun = self._start(url, response)
                have, size, self.resumed = 0, begun.size, False
            else:
                span = re.fullmatch(
                    r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)",
                    response.headers.get("Content-Range", ""),
                )
                size = int(span[2]) if span and span[2] else None
                now = _Version(
                    url,
                    size,
                    response.headers.get("ETag", ""),
                    response.headers.get("Last-Modified", ""),
                )
                if (
                    response.status_code == 416
                    or not span
                    or span[1] != str(have)
                    or begun.differs(now)
                ):
                    self._part.unlink(missing_ok=True)
                    raise _Transient("the file on the host is no longer the one that was begun")
            self._receive(url, response, have, begun.size or size)

    def _begun(self, url: str) -> tuple[int, _Version]:
        """Returns how many bytes are there and of what; none where it cannot be told whether more of the same can be had."""
        have = _size(self._part)
        nothing = _Version(url, None, "", "")
        if have < 0 or not self._note.is_file():
            return 0, nothing
        note = read_json(self._note, "note of a partial file")
        try:
            version = _Version(**note)
        except TypeError:
            return 0, nothing
        if version.url != url or not (version.size or version.etag or version.modified):
            return 0, version
        return have, version

    def _start(self, url: str, response: requests.Response) -> _Version:
        """Begins the file anew and returns what it is."""
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise UserError(
                f"{url}: the host sends a web page instead of the file. See in a browser what it says."
            )
        self._part.unlink(missing_ok=True)
        length = response.headers.get("Content-Length", "")
        etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        version = _Version(url, int(length) if length.isdigit() else None, etag, modified)
        write_json(self._note, dataclasses.asdict(version))
        return version

    def _receive(self, url: str, response: requests.Response, have: int, size: int | None) -> None:
        """Appends the body of the answer."""
        name = url.rpartition("/")[2]
        try:
            with (
                tqdm(
                    total=size,
                    initial=have,
                    unit="B",
                    unit_scale=True,
                    desc=name,
                    disable=not self._host.progress,
                ) as bar,
                open(self._part, "ab") as out,
            ):
                for piece in _pieces(url, response):
                    out.write(piece)
                    out.flush()
                    bar.update(len(piece))
        except OSError as error:
            raise UserError(
                f"{self._part}: cannot be written ({error.strerror or error}). What came is kept; make room and run the same "
                "command again."
            ) from error
        got = _size(self._part)
        if size is not None and got < size:
            raise _Transient(f"the connection broke after {got:,} of {size:,} bytes")
        if size is not None and got > size:
            self._part.unlink()
            raise _Transient(f"{got:,} bytes came where {size:,} were announced")


def _pieces(url: str, response: requests.Response) -> Iterator[bytes]:
    pieces = response.iter_content(_CHUNK)
    while True:
        with _network(url):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece
