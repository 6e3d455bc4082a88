"""Fetches 30 s previews of the Million Song Dataset's songs from 7digital.

A preview is `GET https://previews.7digital.com/clip/<7digital track id>`, signed with OAuth 1.0a
(HMAC-SHA1) in the query. 7digital allows a non-commercial key 4,000 requests per day; see its API
reference (docs.7digital.com, now docs.massivemusic.com), "Preview clip" and "Usage limits".

Every request is written to a ledger before it is sent: no crash lets a key exceed the quota. A day
is the last 24 hours: whenever 7digital's own day begins, it holds no more requests.
"""

import bisect
import contextlib
import csv
import dataclasses
import datetime
import fcntl
import io
import json
import logging
import os
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import requests
import soundfile
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from musicgenre.datasets.base import Skipped
from musicgenre.datasets.msd import OUTCOMES, find_previews, no_songs, preview_folder, walk_songs
from musicgenre.errors import UserError
from musicgenre.files import replacing

BASE_URL = "https://previews.7digital.com/clip"
KEY_VARIABLE, SECRET_VARIABLE = "MUSICGENRE_7DIGITAL_KEY", "MUSICGENRE_7DIGITAL_SECRET"
REQUESTS_PER_DAY = 4000
DAY = 24 * 3600.0
LEDGER = "requests.jsonl"
# 30 s at 320 kbit/s are 1.2 MB.
MAX_BYTES = 10 * 2**20
# If the server asks for a longer wait, the run ends and says when to resume.
LONGEST_WAIT = 300.0
# Consecutive failed songs after which the run ends: more would only use up the quota.
FAILURES_IN_A_ROW = 5
STATUSES = ("found", "not_found", "no_audio", "failed", "no_id", "not_asked")

_TIME = re.compile(r'"time": "([^"]+)"')
# Failures after which a song is tried again.
_RETRIED = (
    requests.Timeout,
    requests.ConnectionError,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)


@dataclasses.dataclass(frozen=True)
class Keys:
    """The consumer key and secret of a 7digital account; neither is ever shown."""

    key: str = dataclasses.field(repr=False)
    secret: str = dataclasses.field(repr=False)


def keys_from_environment() -> Keys:
    """Returns the keys in MUSICGENRE_7DIGITAL_KEY and MUSICGENRE_7DIGITAL_SECRET.

    Raises:
      UserError: one of them is not set.
    """
    values = {name: os.environ.get(name, "").strip() for name in (KEY_VARIABLE, SECRET_VARIABLE)}
    if missing := [name for name, value in values.items() if not value]:
        raise UserError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set in the "
            "environment. They are the consumer key and secret of a 7digital API account."
        )
    return Keys(*values.values())


class Outcome(NamedTuple):
    """The result of a request or for a song: one of STATUSES, and details for people."""

    status: str
    detail: str = ""


class Ledger:
    """All requests, one JSON line each, in a file that only grows; one process may hold it.

    A line is written in two parts: time and song before the request is sent, then its outcome. Each
    is on the disk before the program continues. Entering the context locks the file for writing.

    A damaged line still counts as a request: at its own time if that can be read, else at the
    file's last change.

    Attributes:
      times: of all requests in seconds since 1970, ascending.
      last: the last outcome by 7digital track id.

    Raises:
      UserError: the file cannot be read, locked or written, or `per_day` is below 1.
    """

    def __init__(self, path: str | os.PathLike[str], per_day: int = REQUESTS_PER_DAY) -> None:
        if per_day < 1:
            raise UserError(f"the requests per day must be at least 1, not {per_day}.")
        self.path, self.per_day = Path(path), per_day
        self._file: BinaryIO | None = None
        self._number: int | None = None
        self._read()

    def _read(self) -> bool:
        """Reads the file if it exists; returns whether its last line is complete."""
        self.times, self.last = list[float](), dict[int, Outcome]()
        try:
            text = self.path.read_bytes().decode("utf-8", "replace")
            changed = self.path.stat().st_mtime
        except FileNotFoundError:
            return True
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}).") from error
        for line in filter(str.strip, text.split("\n")):
            self.times.append(changed)
            with contextlib.suppress(ValueError, OverflowError):
                if match := _TIME.search(line):
                    self.times[-1] = datetime.datetime.fromisoformat(match[1]).timestamp()
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                # A redirect is a request, but no outcome.
                if entry["outcome"] in STATUSES:
                    outcome = Outcome(entry["outcome"], str(entry["detail"]))
                    self.last[int(entry["track_7digitalid"])] = outcome
        self.times.sort()
        return text.endswith("\n") or not text

    def __enter__(self) -> "Ledger":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            busy = "another run is using it, and two at once would exceed the quota"
            reason = busy if isinstance(error, BlockingIOError) else error.strerror
            raise UserError(f"{self.path}: this ledger cannot be locked: {reason}.") from error
        if not self._read():
            self._append("\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def used(self) -> int:
        """Returns the number of requests in the last 24 hours."""
        return len(self.times) - bisect.bisect_right(self.times, time.time() - DAY)

    def free_at(self) -> float:
        """Returns when the next request is allowed, in seconds since 1970."""
        return self.times[-self.per_day] + DAY if len(self.times) >= self.per_day else 0.0

    def begin(self, track_id: str, number: int) -> None:
        """Records a request that is about to be sent; one that is still open was a redirect."""
        self.end(Outcome("redirected"))
        now = time.time()
        stamp = datetime.datetime.fromtimestamp(now, datetime.UTC)
        entry = {"time": stamp.isoformat(timespec="milliseconds"), "track_id": track_id}
        bisect.insort(self.times, now)
        self._append(json.dumps(entry | {"track_7digitalid": number})[:-1])
        self._number = number

    def end(self, outcome: Outcome) -> None:
        """Records the outcome of the open request, if there is one."""
        if self._number is None:
            return
        entry = json.dumps({"outcome": outcome.status, "detail": outcome.detail})
        self._append(f", {entry[1:]}\n")
        if outcome.status in STATUSES:
            self.last[self._number] = outcome
        self._number = None

    def _append(self, text: str) -> None:
        assert self._file, "the ledger is not locked"
        try:
            if os.write(self._file.fileno(), text.encode()) != len(text.encode()):
                raise OSError(28, "No space left on device")
            os.fsync(self._file)
        except OSError as error:
            raise UserError(
                f"{self.path}: the ledger of requests cannot be written ({error.strerror})."
            ) from error


class Wanted(NamedTuple):
    """The 7digital id (0 or -1: none) of each song by track id, and the files that are unusable."""

    numbers: dict[str, int]
    skipped: list[Skipped]


def wanted_songs(root: str | os.PathLike[str]) -> Wanted:
    """Returns the songs of a Million Song Dataset folder or file in the order of its files.

    Raises:
      UserError: h5py is not installed, no such folder, no .h5 files, or none that can be used.
    """
    wanted = Wanted({}, [])
    for item in walk_songs(root):
        if isinstance(item, Skipped):
            wanted.skipped.append(item)
        elif wanted.numbers.get(item.track_id, 0) <= 0:
            wanted.numbers[item.track_id] = item.track_7digitalid
    if not wanted.numbers:
        raise no_songs(root, wanted.skipped)
    return wanted


def _outcomes(
    numbers: Mapping[str, int], have: Collection[str], last: Mapping[int, Outcome]
) -> dict[str, Outcome]:
    """Returns what is known of each song: by its file, its 7digital id and the ledger."""
    # A song that was found but whose file was deleted since is asked for again.
    known = {number: outcome for number, outcome in last.items() if outcome.status != "found"}
    return {
        song: Outcome("found")
        if song in have
        else known.get(number, Outcome("not_asked" if number > 0 else "no_id"))
        for song, number in numbers.items()
    }


def _to_ask(outcomes: Mapping[str, Outcome], retry_missing: bool) -> list[str]:
    """Returns the track ids to ask for: new songs first, then failed ones, then missing ones."""
    order = ["not_asked", "no_audio", "failed"] + ["not_found"] * retry_missing
    return [song for status in order for song in outcomes if outcomes[song].status == status]


def plan_lines(
    root: str | os.PathLike[str],
    numbers: Mapping[str, int],
    *,
    ledger: str | os.PathLike[str] = "",
    per_day: int = REQUESTS_PER_DAY,
    limit: int = 0,
    retry_missing: bool = False,
) -> list[str]:
    """Returns for people what `fetch_previews` would ask for. Sends and writes nothing."""
    folder = preview_folder(root)
    book = Ledger(ledger or folder / LEDGER, per_day)
    outcomes = _outcomes(numbers, find_previews(root), book.last)
    counts = Counter(outcome.status for outcome in outcomes.values())
    known = ", ".join(f"{counts[status]} {status.replace('_', ' ')}" for status in STATUSES)
    todo, free = len(_to_ask(outcomes, retry_missing)), max(0, per_day - book.used())
    return [
        f"{folder}: {len(numbers)} songs: {known}.",
        f"would ask for {min(todo, limit or todo)} songs; {free} of {per_day} requests are free.",
    ]


class FetchSummary(NamedTuple):
    """The result of a run."""

    folder: Path  # of the previews and lists
    outcomes: dict[str, Outcome]  # of every song by track id, over all runs
    asked: list[str]  # songs asked for in this run, in order
    requests: int  # of this run; a song may take several
    used: int  # requests of the last 24 hours
    per_day: int  # how many are allowed
    left: int  # songs that are still to be asked for
    pause: str = ""  # why the run ended early and when to resume

    @property
    def incomplete(self) -> bool:
        """Whether running again is likely to find more: the run paused, or songs failed."""
        return bool(self.pause) or "failed" in {self.outcomes[song].status for song in self.asked}

    def lines(self) -> list[str]:
        """The summary for people, one line per item."""
        counts = Counter(outcome.status for outcome in self.outcomes.values())
        asked = {song: self.outcomes[song] for song in self.asked}
        new = sum(outcome.status == "found" for outcome in asked.values())
        lines = [
            f"{self.folder}: {counts['found']} previews of {len(self.outcomes) - counts['no_id']} "
            f"songs with a 7digital id ({new} new); {counts['not_found']} not found, "
            f"{counts['no_audio']} answered without audio, {counts['failed']} failed, "
            f"{counts['not_asked']} not asked for yet; {counts['no_id']} songs have no id.",
            f"{self.requests} requests in this run, {self.used} of {self.per_day} in the last 24 "
            f"hours; all songs are listed in {self.folder / OUTCOMES}.",
        ]
        bad = [
            f"  {song}: {status} ({detail})"
            for song, (status, detail) in asked.items()
            if status in ("no_audio", "failed")
        ]
        lines += bad[:20] + [f"  ... and {len(bad) - 20} more"] * (len(bad) > 20)
        return lines + [f"{self.pause} {self.left} songs are left."] * bool(self.pause)


class _Pause(Exception):
    """The run has to end here; the message says why and when to resume."""


def fetch_previews(
    root: str | os.PathLike[str],
    numbers: Mapping[str, int],
    keys: Keys,
    *,
    ledger: str | os.PathLike[str] = "",
    base_url: str = BASE_URL,
    country: str = "",
    per_day: int = REQUESTS_PER_DAY,
    limit: int = 0,
    retry_missing: bool = False,
    timeout: float = 30.0,
    back_off: Sequence[float] = (1.0, 4.0, 16.0),
    progress: bool = True,
) -> FetchSummary:
    """Fetches missing previews into `<root>/previews/<track_id>.mp3`, and lists all outcomes.

    Songs that were found, or that 7digital does not have (404), are not asked for again. A file
    appears complete or not at all, and only if it is an mp3 that can be decoded. `previews.csv` has
    one row per song: track_id, track_7digitalid, status, detail.

    Args:
      root: the data set's folder or file.
      numbers: 7digital track id by track id, from `wanted_songs`.
      keys: from `keys_from_environment`.
      ledger: the list of requests; "" is requests.jsonl beside the previews. One key needs one
        ledger.
      base_url: the address that the track id is appended to.
      country: ISO code of the shop, such as "GB"; "" is the account's.
      per_day: requests within 24 hours, retries included.
      limit: maximum number of songs to ask for in this run; 0 is all.
      retry_missing: ask again for songs that were not found.
      timeout: seconds without a byte after which a request is given up.
      back_off: seconds before each further attempt for a song after 429, 5xx, a timeout or a cut
        connection, where the server does not say (Retry-After).
      progress: draw a bar.

    Returns:
      What was done. The run may have ended early at the quota; `pause` then says when to resume.

    Raises:
      UserError: requests-oauthlib is not installed, a wrong address, another run holds the ledger,
        the disk is full, or several songs in a row fail (refused keys, no network).
    """
    folder = preview_folder(root)
    if urllib.parse.urlsplit(base_url).scheme not in ("http", "https"):
        raise UserError(f"--base_url={base_url!r} does not begin with https:// or http://.")
    with Ledger(ledger or folder / LEDGER, per_day) as book:
        client = _Client(keys, book, back_off)
        options = {"params": {"country": country} if country else None, "timeout": timeout}
        have = set(find_previews(root))
        todo = _to_ask(_outcomes(numbers, have, book.last), retry_missing)
        before, asked, pause, in_a_row = len(book.times), list[str](), "", 0
        try:
            for song in tqdm(todo[: limit or None], "previews", unit="song", disable=not progress):
                url, path = f"{base_url.rstrip('/')}/{numbers[song]}", folder / f"{song}.mp3"
                outcome = client.fetch(song, numbers[song], url, path, options)
                asked.append(song)
                have |= {song} if outcome.status == "found" else set()
                in_a_row = in_a_row + 1 if outcome.status == "failed" else 0
                if in_a_row == FAILURES_IN_A_ROW:
                    raise UserError(
                        f"{in_a_row} songs in a row failed, the last one {song}: {outcome.detail}. "
                        f"If the requests are refused, check {KEY_VARIABLE}, {SECRET_VARIABLE}, "
                        "this machine's clock and the account's rights; otherwise the network. "
                        "What was found is kept."
                    )
        except _Pause as reason:
            pause = str(reason)
        finally:
            # An interrupted run lists what it got, too.
            outcomes = _outcomes(numbers, have, book.last)
            rows = [[song, numbers[song], *outcome] for song, outcome in outcomes.items()]
            with (
                replacing(folder / OUTCOMES) as path,
                open(path, "w", encoding="utf-8", newline="") as file,
            ):
                columns = ["track_id", "track_7digitalid", "status", "detail"]
                csv.writer(file).writerows([columns, *rows])
        left, count = len(todo) - len(asked), len(book.times) - before
        return FetchSummary(folder, outcomes, asked, count, book.used(), per_day, left, pause)


class _Client(requests.Session):
    """Sends signed requests; each, redirects included, is in the ledger before it is sent."""

    def __init__(self, keys: Keys, ledger: Ledger, back_off: Sequence[float]) -> None:
        super().__init__()
        try:
            from requests_oauthlib import OAuth1
        except ImportError as error:
            raise UserError(
                "fetching previews needs requests-oauthlib: pip install 'musicgenre[msd]'."
            ) from error
        # The logs of these libraries show the key and signed addresses.
        for name in ("oauthlib", "requests_oauthlib", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.headers["User-Agent"] = "musicgenre"
        self.max_redirects = 3
        self.auth = OAuth1(keys.key, client_secret=keys.secret, signature_type="query")
        self._ledger, self._back_off, self._song = ledger, back_off, ("", 0)

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Records the request and sends it; raises _Pause where the quota is used up."""
        if (free_at := self._ledger.free_at()) > time.time():
            raise _Pause(
                f"The {self._ledger.per_day} requests of 24 hours are used up. Resume after "
                f"{_utc(free_at)}:"
            )
        self._ledger.begin(*self._song)
        return super().send(request, **options)

    def fetch(
        self, track_id: str, number: int, url: str, path: Path, options: Mapping[str, Any]
    ) -> Outcome:
        """Saves one preview, with retries; raises _Pause where the run has to end."""
        self._song = (track_id, number)
        for default in (*self._back_off, None):
            outcome, again, asked = Outcome("failed", "interrupted"), False, None
            try:
                with self.get(url, stream=True, **options) as response:
                    outcome, again = _save(response, path)
                    asked = _asked_wait(response) if again else None
            except requests.RequestException as error:
                # The message would show the signed address.
                outcome = Outcome("failed", type(error).__name__)
                again = isinstance(error, _RETRIED)
            finally:
                self._ledger.end(outcome)
            pause = default if asked is None else asked
            if pause and pause > LONGEST_WAIT:
                resume = _utc(time.time() + pause)
                raise _Pause(
                    f"7digital asks for a pause ({outcome.detail}). Resume after {resume}:"
                )
            if not again or default is None:
                break
            time.sleep(pause or 0)
        if outcome.detail == "HTTP 429":
            raise _Pause(
                "7digital refuses further requests (HTTP 429) and does not say until when. Resume "
                "in some hours:"
            )
        return outcome


def _save(response: requests.Response, path: Path) -> tuple[Outcome, bool]:
    """Saves a response if it is an mp3; returns the outcome and whether to try again."""
    status = response.status_code
    if status in (404, 410):
        return Outcome("not_found", f"HTTP {status}"), False
    if status != 200:
        refused = ", refused" if status in (401, 403) else ""
        return Outcome("failed", f"HTTP {status}{refused}"), status in (408, 429) or status >= 500
    body = b""
    for chunk in response.iter_content(2**16):
        body += chunk
        if len(body) > MAX_BYTES:
            return Outcome("no_audio", f"more than {MAX_BYTES >> 20} MB"), False
    try:
        with soundfile.SoundFile(io.BytesIO(body)) as file:
            decodable = file.format == "MP3" and file.frames > 0
    except (soundfile.LibsndfileError, RuntimeError):
        decodable = False
    if not decodable:
        what = response.headers.get("Content-Type", "unknown type")
        return Outcome("no_audio", f"no mp3 but {len(body)} bytes of {what}"), False
    with replacing(path) as temporary:
        temporary.write_bytes(body)
    return Outcome("found", f"{len(body)} bytes"), False


def _asked_wait(response: requests.Response) -> float | None:
    """Returns how many seconds the server asks to wait: Retry-After, or 7digital's own header."""
    value = response.headers.get("Retry-After", "").strip()
    if not value and response.status_code == 429:
        # This header is in every response; only here it means that no requests are left.
        value = response.headers.get("X-RateLimit-Reset", "").strip()
    with contextlib.suppress(InvalidHeader):
        return Retry().parse_retry_after(value)
    return None


def _utc(seconds: float) -> str:
    """Returns a time for people, rounded up to the minute."""
    minute = datetime.datetime.fromtimestamp(-(-seconds // 60) * 60, datetime.UTC)
    return minute.strftime("%Y-%m-%d %H:%M UTC")
