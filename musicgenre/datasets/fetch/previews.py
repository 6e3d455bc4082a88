"""30 s previews of the Million Song Dataset's songs from 7digital, by each song's 7digital track id.

A preview is `GET https://previews.7digital.com/clip/<track id>`, signed with OAuth 1.0a (HMAC-SHA1) in the query. 7digital allows
a key that is not commercial 4,000 requests a day and reports its count in the headers X-RateLimit-Limit, -Current and -Reset
(seconds); see its API reference (docs.7digital.com, now docs.massivemusic.com), "Preview clip" and "Usage limits".

Every request is written into a ledger before it is sent, so that no crash can make a key ask more often than allowed. The day
is the last 24 hours: whenever 7digital's own day begins, no day of it then holds more requests than the limit. Calendar days of
ours would let two days' requests pass within an hour around midnight.
"""

import bisect
import contextlib
import csv
import dataclasses
import datetime
import email.utils
import fcntl
import io
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import soundfile
from tqdm import tqdm

from musicgenre.datasets.base import Skipped
from musicgenre.datasets.msd import OUTCOMES, find_previews, preview_folder, walk_songs
from musicgenre.errors import UserError
from musicgenre.files import replacing

BASE_URL = "https://previews.7digital.com/clip"
KEY_VARIABLE, SECRET_VARIABLE = "MUSICGENRE_7DIGITAL_KEY", "MUSICGENRE_7DIGITAL_SECRET"
REQUESTS_PER_DAY = 4000
DAY = 24 * 3600.0
LEDGER = "requests.jsonl"
# 30 s at 320 kbit/s are 1.2 MB.
MAX_BYTES = 10 * 2**20
# A longer wait than this that the server asks for ends the run; it says when to go on.
LONGEST_WAIT = 300.0
# One preview may take this long from the first byte to the last, however slowly it drips.
LONGEST_DOWNLOAD = 120.0
MAX_REDIRECTS = 3
# So many songs one after the other without an answer that counts: going on would only use up the day's requests.
FAILURES_IN_A_ROW = 5
STATUSES = ("found", "not_found", "no_audio", "failed", "no_id", "not_asked")

_TIME = re.compile(r'"time": "([^"]+)"')


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
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set. Set {KEY_VARIABLE} and {SECRET_VARIABLE} in "
            "the environment to the consumer key and secret of a 7digital API account; they are read from nowhere else."
        )
    return Keys(values[KEY_VARIABLE], values[SECRET_VARIABLE])


class Outcome(NamedTuple):
    """What came of a request or a song: one of STATUSES, and the particulars for people."""

    status: str
    detail: str = ""


class History(NamedTuple):
    """What a ledger tells: the times of its requests in seconds since 1970, in order, and the last outcome by 7digital id."""

    times: list[float]
    last: dict[int, Outcome]


def read_ledger(path: str | os.PathLike[str]) -> History:
    """Reads a ledger; nothing where there is none yet.

    A line that was cut short or damaged still counts as a request: at its own time if that can be read, else at that of the
    next line that has one, else at the file's last change.

    Raises:
      UserError: the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
        latest = path.stat().st_mtime
    except FileNotFoundError:
        return History([], {})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    times: list[float] = []
    last: dict[int, Outcome] = {}
    for line in reversed(lines):
        if not line.strip():
            continue
        with contextlib.suppress(ValueError, OverflowError):
            match = _TIME.search(line)
            latest = datetime.datetime.fromisoformat(match[1]).timestamp() if match else latest
        times.append(latest)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            # A redirect is a request, but no outcome.
            if entry["outcome"] in STATUSES:
                last.setdefault(
                    int(entry["track_7digitalid"]), Outcome(entry["outcome"], str(entry["detail"]))
                )
    return History(sorted(times), last)


class Ledger:
    """The list of all requests, one JSON line each, in a file that only grows. One process at a time may hold it.

    A line is written in two parts: the first, before the request is sent, has its time and song, the second what came of it.
    Each is on the disk before the program goes on.
    """

    def __init__(
        self, path: str | os.PathLike[str], per_day: int, now: Callable[[], float] = time.time
    ) -> None:
        """Names the file; entering the context opens it.

        Args:
          path: the file; made if it is not there.
          per_day: requests within 24 hours.
          now: the clock, in seconds since 1970.
        """
        if per_day < 1:
            raise UserError(f"the requests a day must be at least 1, not {per_day}.")
        self.path, self.per_day, self._now = Path(path), per_day, now
        self.history = History([], {})
        self._file = -1

    def __enter__(self) -> "Ledger":
        """Locks the file, completes a line that a crash cut short, and reads it.

        Raises:
          UserError: another process holds it, or it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.__exit__()
            raise UserError(
                f"{self.path}: another run is using this ledger. Let it end first; two at once would ask more often than allowed."
            ) from error
        except OSError as error:
            self.__exit__()
            raise UserError(
                f"{self.path}: the ledger of requests cannot be opened and locked ({error.strerror})."
            ) from error
        try:
            self.history = read_ledger(self.path)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                self._append("\n")
        except UserError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file, which frees the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def used(self) -> int:
        """Returns how many requests the last 24 hours hold."""
        return _requests_since(self.history.times, self._now() - DAY)

    def free_at(self) -> float:
        """Returns when the next request is allowed, in seconds since 1970; now or earlier where it is already."""
        times = self.history.times
        return times[-self.per_day] + DAY if len(times) >= self.per_day else 0.0

    @contextlib.contextmanager
    def request(self, track_id: str, number: int) -> Iterator[list[Outcome]]:
        """Notes a request before it is sent and, at the end of the context, what came of it.

        Yields:
          A list with the outcome "failed, broken off", to be replaced by the real one.

        Raises:
          UserError: the ledger cannot be written, so the request must not be sent.
        """
        now = self._now()
        stamp = datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat(
            timespec="milliseconds"
        )
        head = json.dumps({"time": stamp, "track_id": track_id, "track_7digitalid": number})
        bisect.insort(self.history.times, now)
        self._append(head[:-1])
        outcome = [Outcome("failed", "broken off")]
        try:
            yield outcome
        finally:
            tail = json.dumps({"outcome": outcome[0].status, "detail": outcome[0].detail})
            self._append(f", {tail[1:]}\n")
            if outcome[0].status in STATUSES:
                self.history.last[number] = outcome[0]

    def _append(self, text: str) -> None:
        data = text.encode()
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(28, "No space left on device")
            os.fsync(self._file)
        except OSError as error:
            raise UserError(
                f"{self.path}: the ledger of requests cannot be written ({error.strerror}). Free some space and run it again."
            ) from error


def _requests_since(times: Sequence[float], start: float) -> int:
    return len(times) - bisect.bisect_right(times, start)


class Wanted(NamedTuple):
    """The songs of a data set by track id with their 7digital track ids (0 or -1: none), and files that were skipped."""

    numbers: dict[str, int]
    skipped: list[Skipped]


def wanted_songs(root: str | os.PathLike[str]) -> Wanted:
    """Returns the songs of a Million Song Dataset folder or file in the order of its files.

    Raises:
      UserError: h5py is not installed, no such folder, no .h5 files, or none that can be used.
    """
    numbers: dict[str, int] = {}
    skipped: list[Skipped] = []
    for item in walk_songs(root):
        if isinstance(item, Skipped):
            skipped.append(item)
        elif numbers.get(item.track_id, 0) <= 0:
            numbers[item.track_id] = item.track_7digitalid
    if not numbers:
        first = f"; the first is {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        raise UserError(
            f"{root}: no song in its .h5 files, {len(skipped)} of which cannot be used{first}"
        )
    return Wanted(numbers, skipped)


def outcomes_of(
    numbers: Mapping[str, int], have: Collection[str], last: Mapping[int, Outcome]
) -> dict[str, Outcome]:
    """Returns what is known of each song: by its file, its 7digital id and the ledger."""

    def known(track_id: str, number: int) -> Outcome:
        if track_id in have:
            return Outcome("found")
        if number <= 0:
            return Outcome("no_id")
        outcome = last.get(number, Outcome("not_asked"))
        # Found once, but its file was deleted since.
        return Outcome("not_asked") if outcome.status == "found" else outcome

    return {track_id: known(track_id, number) for track_id, number in numbers.items()}


def songs_to_ask(outcomes: Mapping[str, Outcome], *, retry_missing: bool = False) -> list[str]:
    """Returns the track ids to ask for: first those never asked for, then those that failed, then those not found (if wanted)."""
    order = ["not_asked", "no_audio", "failed"] + ["not_found"] * retry_missing
    asked = [track_id for track_id, outcome in outcomes.items() if outcome.status in order]
    return sorted(asked, key=lambda track_id: order.index(outcomes[track_id].status))


def plan_lines(
    root: str | os.PathLike[str],
    numbers: Mapping[str, int],
    *,
    ledger: str | os.PathLike[str] = "",
    per_day: int = REQUESTS_PER_DAY,
    limit: int = 0,
    retry_missing: bool = False,
    now: Callable[[], float] = time.time,
) -> list[str]:
    """Returns for people what `fetch_previews` with the same arguments would ask for. Sends and writes nothing."""
    folder = preview_folder(root)
    history = read_ledger(ledger or folder / LEDGER)
    outcomes = outcomes_of(numbers, find_previews(root), history.last)
    counts = Counter(outcome.status for outcome in outcomes.values())
    todo = songs_to_ask(outcomes, retry_missing=retry_missing)
    used = _requests_since(history.times, now() - DAY)
    return [
        f"{folder}: {len(numbers)} songs: "
        + ", ".join(f"{counts[status]} {status.replace('_', ' ')}" for status in STATUSES)
        + ".",
        f"would ask for {min(len(todo), limit or len(todo))} songs; {max(0, per_day - used)} of {per_day} requests are free.",
    ]


@dataclasses.dataclass(frozen=True)
class FetchSummary:
    """What a run did.

    Attributes:
      folder: where the previews and the lists are.
      outcomes: of every song by track id, over all runs.
      asked: songs asked for in this run, in order.
      requests: made in this run; a song may take several.
      used: requests of the last 24 hours.
      per_day: how many are allowed.
      left: songs that should be asked for still.
      pause: why the run ended early and when to go on; "" where it did not.
    """

    folder: Path
    outcomes: dict[str, Outcome]
    asked: list[str]
    requests: int
    used: int
    per_day: int
    left: int
    pause: str = ""

    @property
    def incomplete(self) -> bool:
        """Whether running again is likely to get more: the run paused, or songs failed."""
        return bool(self.pause) or any(
            self.outcomes[track_id].status == "failed" for track_id in self.asked
        )

    def lines(self) -> list[str]:
        """The summary for people, one line an item."""
        counts = Counter(outcome.status for outcome in self.outcomes.values())
        new = Counter(self.outcomes[track_id].status for track_id in self.asked)
        with_id = len(self.outcomes) - counts["no_id"]
        lines = [
            f"{self.folder}: {counts['found']} previews of {with_id} songs with a 7digital id ({new['found']} new); "
            f"{counts['not_found']} not found, {counts['no_audio']} answered without sound, {counts['failed']} failed, "
            f"{counts['not_asked']} not asked for yet; {counts['no_id']} songs have no id.",
            f"{self.requests} requests in this run, {self.used} of {self.per_day} in the last 24 hours; all songs are listed in "
            f"{self.folder / OUTCOMES}.",
        ]
        bad = [
            track_id
            for track_id in self.asked
            if self.outcomes[track_id].status in ("no_audio", "failed")
        ]
        lines += [
            f"  {track_id}: {self.outcomes[track_id].status} ({self.outcomes[track_id].detail})"
            for track_id in bad[:20]
        ]
        if len(bad) > 20:
            lines.append(f"  ... and {len(bad) - 20} more")
        if self.pause:
            lines.append(f"{self.pause} {self.left} songs are left.")
        return lines


class _Pause(Exception):
    """The run has to end here; the message says why and when to go on."""


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
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
    progress: bool = True,
) -> FetchSummary:
    """Fetches the previews that are not there yet into `<root>/previews/<track_id>.mp3`, and writes the list of what came of it.

    Songs that were found, or that 7digital does not have (404), are not asked for again. A file appears whole or not at all, and
    only if it is an mp3 that can be decoded. `previews.csv` has a row a song: track_id, track_7digitalid, status, detail.

    Args:
      root: the data set's folder or file.
      numbers: 7digital track id by track id, as of `wanted_songs`.
      keys: of the 7digital account.
      ledger: the list of requests; "" is requests.jsonl beside the previews. One key needs one ledger.
      base_url: the address that the track id is added to.
      country: ISO code of the shop, such as "GB"; "" leaves it to the account.
      per_day: requests within 24 hours; retries count.
      limit: songs to ask for in this run at most; 0 is all.
      retry_missing: ask again for songs that were not found.
      timeout: seconds without a byte after which a request is given up.
      back_off: seconds before each further try of a song after 429, 5xx, a timeout or a cut connection, where the server does
        not say (Retry-After).
      now: the clock, in seconds since 1970.
      sleep: waits for a number of seconds.
      progress: draw a bar.

    Returns:
      What was done. It may have ended early at the limit; `pause` then says when to go on.

    Raises:
      UserError: requests-oauthlib is not installed, a wrong address, another run holds the ledger, the disk is full, or several
        songs in a row fail (keys that are refused, no network).
    """
    folder = preview_folder(root)
    if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).netloc:
        raise UserError(
            f"--base_url={base_url!r} is no address that begins with https:// or http://."
        )
    with Ledger(ledger or folder / LEDGER, per_day, now) as book:
        client = _Client(keys, book, base_url.rstrip("/"), country, timeout, back_off, now, sleep)
        have, last = set(find_previews(root)), book.history.last
        todo = songs_to_ask(outcomes_of(numbers, have, last), retry_missing=retry_missing)
        before, asked, pause, in_a_row = len(book.history.times), list[str](), "", 0
        try:
            for track_id in tqdm(
                todo[: limit or None], unit="song", desc="previews", disable=not progress
            ):
                outcome = client.fetch(track_id, numbers[track_id], folder / f"{track_id}.mp3")
                asked.append(track_id)
                if outcome.status == "found":
                    have.add(track_id)
                in_a_row = in_a_row + 1 if outcome.status == "failed" else 0
                if in_a_row == FAILURES_IN_A_ROW:
                    raise UserError(
                        f"{in_a_row} songs in a row failed, the last one {track_id}: {outcome.detail}. If the requests are "
                        f"refused, check {KEY_VARIABLE}, {SECRET_VARIABLE}, this machine's clock and what the account may do; "
                        "otherwise the network. What was found is kept."
                    )
        except _Pause as reason:
            pause = str(reason)
        except BaseException:
            # A run that is broken off lists what it got, too; why it was broken off matters more than a list that fails.
            with contextlib.suppress(UserError):
                _write_outcomes(folder / OUTCOMES, numbers, outcomes_of(numbers, have, last))
            raise
        outcomes = outcomes_of(numbers, have, last)
        _write_outcomes(folder / OUTCOMES, numbers, outcomes)
        left = len(todo) - len(asked)
        return FetchSummary(
            folder,
            outcomes,
            asked,
            len(book.history.times) - before,
            book.used(),
            per_day,
            left,
            pause,
        )


def _write_outcomes(
    path: Path, numbers: Mapping[str, int], outcomes: Mapping[str, Outcome]
) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["track_id", "track_7digitalid", "status", "detail"])
        writer.writerows(
            [track_id, numbers[track_id], *outcome] for track_id, outcome in outcomes.items()
        )


class _Answer(NamedTuple):
    """What one request got, whether another try may get more, after how many seconds, or from where."""

    outcome: Outcome
    again: bool = False
    wait: float | None = None
    location: str = ""


class _Client:
    """Asks for previews, one request at a time, each in the ledger."""

    def __init__(
        self,
        keys: Keys,
        ledger: Ledger,
        base_url: str,
        country: str,
        timeout: float,
        back_off: Sequence[float],
        now: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        try:
            import requests
            from requests_oauthlib import OAuth1
        except ImportError as error:
            raise UserError(
                "fetching previews needs requests-oauthlib, which is not installed: pip install 'musicgenre[msd]'."
            ) from error
        # What these libraries log shows the key and signed addresses.
        for name in ("oauthlib", "requests_oauthlib", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._requests = requests
        self._session = requests.Session()
        self._session.headers["User-Agent"] = "musicgenre"
        self._auth = OAuth1(keys.key, client_secret=keys.secret, signature_type="query")
        self._ledger, self._base_url, self._country, self._timeout = (
            ledger,
            base_url,
            country,
            timeout,
        )
        self._back_off, self._now, self._sleep = back_off, now, sleep

    def fetch(self, track_id: str, number: int, path: Path) -> Outcome:
        """Gets one song's preview into `path`, with retries; raises _Pause where the run has to end."""
        for wait in [*self._back_off, None]:
            answer = self._follow(track_id, number, path)
            if not answer.again:
                return answer.outcome
            pause = answer.wait if answer.wait is not None else wait
            if pause is not None and pause > LONGEST_WAIT:
                raise _Pause(
                    f"7digital asks for a pause ({answer.outcome.detail}). Go on after {_utc(self._now() + pause)}:"
                )
            if wait is None or pause is None:
                break
            self._sleep(pause)
        if answer.outcome.detail == "HTTP 429":
            raise _Pause(
                "7digital refuses further requests (HTTP 429) and does not say until when. Go on in some hours:"
            )
        return answer.outcome

    def _follow(self, track_id: str, number: int, path: Path) -> _Answer:
        """Makes a request and those that it is redirected to; these are complete addresses, so they are not signed again."""
        answer = self._request(track_id, number, path, "")
        for _ in range(MAX_REDIRECTS):
            if not answer.location:
                return answer
            answer = self._request(track_id, number, path, answer.location)
        return (
            answer
            if not answer.location
            else _Answer(Outcome("failed", f"more than {MAX_REDIRECTS} redirects"))
        )

    def _request(self, track_id: str, number: int, path: Path, location: str) -> _Answer:
        if self._ledger.free_at() > self._now():
            raise _Pause(
                f"The {self._ledger.per_day} requests of 24 hours are used up. Go on after {_utc(self._ledger.free_at())}:"
            )
        with self._ledger.request(track_id, number) as noted:
            # The text of the library's errors holds the signed address, so it is never shown.
            try:
                answer = self._get(
                    location or f"{self._base_url}/{number}", signed=not location, path=path
                )
            except self._requests.Timeout:
                answer = _Answer(Outcome("failed", "timed out"), again=True)
            except (
                self._requests.exceptions.ChunkedEncodingError,
                self._requests.exceptions.ContentDecodingError,
            ):
                answer = _Answer(
                    Outcome("failed", "the connection was cut within the answer"), again=True
                )
            except self._requests.ConnectionError:
                answer = _Answer(Outcome("failed", "no connection, or it was cut"), again=True)
            except self._requests.RequestException as error:
                answer = _Answer(Outcome("failed", type(error).__name__))
            noted[0] = answer.outcome
            return answer

    def _get(self, url: str, *, signed: bool, path: Path) -> _Answer:
        with self._session.get(
            url,
            params={"country": self._country} if self._country and signed else None,
            auth=self._auth if signed else None,
            timeout=self._timeout,
            allow_redirects=False,
            stream=True,
        ) as response:
            status = response.status_code
            detail = f"HTTP {status}"
            if status == 200:
                return self._keep(response, path)
            if status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                return _Answer(
                    Outcome("redirected", detail),
                    location=urljoin(url, response.headers["Location"]),
                )
            if status in (404, 410):
                return _Answer(Outcome("not_found", detail))
            if status in (408, 429) or status >= 500:
                return _Answer(
                    Outcome("failed", detail),
                    again=True,
                    wait=self._wanted_wait(status, response.headers),
                )
            return _Answer(
                Outcome("failed", detail + (", refused" if status in (401, 403) else ""))
            )

    def _keep(self, response: Any, path: Path) -> _Answer:
        """Saves the body if it is an mp3."""
        body = b""
        begun = self._now()
        for chunk in response.iter_content(2**16):
            body += chunk
            if len(body) > MAX_BYTES:
                return _Answer(Outcome("no_audio", f"more than {MAX_BYTES >> 20} MB"))
            if self._now() - begun > LONGEST_DOWNLOAD:
                return _Answer(Outcome("failed", "timed out"), again=True)
        if wrong := _not_mp3(body):
            return _Answer(Outcome("no_audio", wrong))
        with replacing(path) as temporary:
            temporary.write_bytes(body)
        return _Answer(Outcome("found", f"{len(body)} bytes"))

    def _wanted_wait(self, status: int, headers: Mapping[str, str]) -> float | None:
        """Returns how many seconds the server asks to wait: Retry-After (seconds or a date), or 7digital's own header."""
        value = headers.get("Retry-After", "").strip()
        if not value and status == 429:
            # This one comes with every answer; only here it says that there are no requests left.
            value = headers.get("X-RateLimit-Reset", "").strip()
        if value.isascii() and value.isdigit():
            return float(value[:9])
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - self._now())
        return None


def _not_mp3(body: bytes) -> str:
    """Returns why some bytes are no mp3 file; "" where they are one."""
    start = body[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if not start:
        return "an empty answer"
    if start in (b"<", b"{", b"["):
        return f"{'a web page or XML' if start == b'<' else 'JSON'} instead of sound"
    try:
        with soundfile.SoundFile(io.BytesIO(body)) as file:
            return "" if file.format == "MP3" and file.frames > 0 else f"{file.format}, not mp3"
    except (soundfile.LibsndfileError, RuntimeError):
        return "no mp3 that can be decoded"


def _utc(seconds: float) -> str:
    """Returns a time for people, rounded up to the minute."""
    return datetime.datetime.fromtimestamp(-(-seconds // 60) * 60, datetime.UTC).strftime(
        "%Y-%m-%d %H:%M UTC"
    )
