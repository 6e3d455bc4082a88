import base64
import csv
import email.utils
import hashlib
import hmac
import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import numpy as np
import pytest
import soundfile

from musicgenre.datasets.base import Skipped
from musicgenre.datasets.fetch import previews
from musicgenre.datasets.fetch.previews import (
    Keys,
    Ledger,
    Outcome,
    fetch_previews,
    keys_from_environment,
)
from musicgenre.errors import UserError

pytest.importorskip(
    "requests_oauthlib", reason="requests-oauthlib is not installed (the extra msd)"
)

ROOT = Path(__file__).resolve().parents[3]
KEY, SECRET = "key-of-the-test", "s3cret & with/odd=signs"
KEYS = Keys(KEY, SECRET)
START = 1_750_000_000.0


def mp3(seconds=1.0):
    data = io.BytesIO()
    samples = 0.3 * np.sin(np.arange(int(22050 * seconds)) / 20)
    soundfile.write(data, samples, 22050, format="MP3")
    return data.getvalue()


SOUND = mp3()


def track(number):
    return f"TR{number:016d}"


def songs(*numbers):
    return {track(number): number for number in numbers}


def signature_is_right(target, host, secret, nonces):
    """Computes the signature of RFC 5849 anew and holds the request's against it."""
    parts = urlsplit(target)
    given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)
    values = dict(given)
    signature = values.get("oauth_signature")
    pairs = sorted(
        (quote(k, safe="~"), quote(v, safe="~")) for k, v in given if k != "oauth_signature"
    )
    joined = "&".join(f"{k}={v}" for k, v in pairs)
    text = "&".join(("GET", quote(f"http://{host}{parts.path}", safe=""), quote(joined, safe="")))
    wanted = base64.b64encode(
        hmac.new(f"{quote(secret, safe='')}&".encode(), text.encode(), hashlib.sha1).digest()
    ).decode()
    fresh = (
        values["oauth_nonce"] not in nonces
        and abs(time.time() - int(values["oauth_timestamp"])) < 300
    )
    nonces.add(values["oauth_nonce"])
    method = (
        values["oauth_signature_method"],
        values["oauth_version"],
        values["oauth_consumer_key"],
    )
    return signature == wanted and fresh and method == ("HMAC-SHA1", "1.0", KEY)


def sign_and_answer(handler):
    server, path = handler.server, urlsplit(handler.path).path
    server.asked.append(handler.path)
    if not path.startswith("/clip/"):
        return handler.answer(200, SOUND)
    if not signature_is_right(handler.path, handler.headers["Host"], SECRET, server.nonces):
        return handler.answer(401, b"bad signature")
    answers = server.answers.get(int(path.rsplit("/", 1)[1]), [(404, b"")])
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    return answer(handler) if callable(answer) else handler.answer(*answer)


def cut(handler):
    handler.answer(200, SOUND[:1000], length=len(SOUND))
    handler.close_connection = True


def drop(handler):
    handler.close_connection = True
    handler.connection.close()


def stall(handler):
    handler.server.released.wait(20)


@pytest.fixture
def seven(server):
    """Stands in for 7digital; `answers`: the responses by track id, the last one repeated."""
    server.respond = sign_and_answer
    server.answers, server.asked, server.nonces = {}, [], set()
    server.url = f"{server.address}/clip"
    return server


class Clock:
    """A clock that stands still except for sleeping."""

    def __init__(self):
        self.now, self.slept = START, []

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "time", clock.time)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


@pytest.fixture
def fetch(seven, clock, tmp_path):
    def run(numbers, keys=KEYS, **options):
        options = {"base_url": seven.url, "progress": False, **options}
        return fetch_previews(tmp_path, numbers, keys, **options)

    return run


def ids_asked(seven):
    return [int(urlsplit(path).path.rsplit("/", 1)[1]) for path in seven.asked]


def ledger_lines(folder):
    return [
        json.loads(line)
        for line in (folder / "previews" / "requests.jsonl").read_text().splitlines()
    ]


def ledger_line(time):
    return (
        f'{{"time": "{time}+00:00", "track_id": "x", "track_7digitalid": 9, '
        '"outcome": "found", "detail": ""}'
    )


def statuses(summary):
    return {int(track_id[2:]): outcome.status for track_id, outcome in summary.outcomes.items()}


def test_songs_are_found_or_not_and_listed(fetch, seven, clock, tmp_path):
    seven.answers = {
        1: [(200, SOUND)],
        3: [(500, b"oops"), (200, SOUND)],
        4: [(200, b"<html>sorry</html>")],
    }
    summary = fetch(songs(1, 2, 3, 4) | {track(5): 0, track(6): -1})
    assert statuses(summary) == {
        1: "found",
        2: "not_found",
        3: "found",
        4: "no_audio",
        5: "no_id",
        6: "no_id",
    }
    folder = tmp_path / "previews"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{track(1)}.mp3",
        f"{track(3)}.mp3",
        "previews.csv",
        "requests.jsonl",
    ]
    assert (folder / f"{track(1)}.mp3").read_bytes() == SOUND
    assert ids_asked(seven) == [1, 2, 3, 3, 4] and clock.slept == [1.0]
    assert list(csv.reader((folder / "previews.csv").open())) == [
        ["track_id", "track_7digitalid", "status", "detail"],
        [track(1), "1", "found", ""],
        [track(2), "2", "not_found", "HTTP 404"],
        [track(3), "3", "found", ""],
        [track(4), "4", "no_audio", "a web page or XML instead of audio"],
        [track(5), "0", "no_id", ""],
        [track(6), "-1", "no_id", ""],
    ]
    assert [
        (line["track_id"], line["outcome"], line["detail"]) for line in ledger_lines(tmp_path)
    ] == [
        (track(1), "found", f"{len(SOUND)} bytes"),
        (track(2), "not_found", "HTTP 404"),
        (track(3), "failed", "HTTP 500"),
        (track(3), "found", f"{len(SOUND)} bytes"),
        (track(4), "no_audio", "a web page or XML instead of audio"),
    ]
    assert ledger_lines(tmp_path)[0]["time"] == "2025-06-15T15:06:40.000+00:00"
    assert summary.lines() == [
        f"{folder}: 2 previews of 4 songs with a 7digital id (2 new); 1 not found, 1 answered "
        f"without audio, 0 failed, "
        "0 not asked for yet; 2 songs have no id.",
        f"5 requests in this run, 5 of 4000 in the last 24 hours; all songs are listed in "
        f"{folder}/previews.csv.",
        f"  {track(4)}: no_audio (a web page or XML instead of audio)",
    ]
    assert not summary.incomplete


def test_a_second_run_asks_only_for_what_is_open(fetch, seven, tmp_path):
    seven.answers = {1: [(200, SOUND)], 3: [(200, b"{}"), (200, SOUND)], 4: [(403, b"")]}
    fetch(songs(1, 2, 3, 4))
    seven.asked.clear()
    # A new song comes before those that failed.
    summary = fetch(songs(1, 2, 3, 4, 5))
    assert ids_asked(seven) == [5, 3, 4] and statuses(summary) == {
        1: "found",
        2: "not_found",
        3: "found",
        4: "failed",
        5: "not_found",
    }
    assert (
        summary.incomplete
        and "2 previews of 5 songs with a 7digital id (1 new)" in summary.lines()[0]
    )
    seven.asked.clear()
    seven.answers[2] = [(200, SOUND)]
    summary = fetch(songs(1, 2, 3), retry_missing=True)
    assert ids_asked(seven) == [2] and statuses(summary)[2] == "found"
    seven.asked.clear()
    (tmp_path / "previews" / f"{track(1)}.mp3").unlink()
    fetch(songs(1, 2, 3))
    assert ids_asked(seven) == [1]


def test_the_daily_limit_counts_retries_and_the_last_24_hours(fetch, seven, clock, tmp_path):
    seven.answers = {n: [(200, SOUND)] for n in (1, 3, 4, 5)} | {2: [(503, b""), (200, SOUND)]}
    summary = fetch(songs(1, 2, 3, 4, 5), per_day=4)
    # 1, 2, 2 again after a second, 3.
    assert ids_asked(seven) == [1, 2, 2, 3] and summary.incomplete and summary.left == 2
    assert (
        summary.lines()[-1]
        == "The 4 requests of 24 hours are used up. Resume after 2025-06-16 15:07 UTC: 2 songs are "
        "left."
    )
    assert list(statuses(summary).values()) == ["found"] * 3 + ["not_asked"] * 2
    clock.now = START + 24 * 3600 - 1
    assert fetch(songs(1, 2, 3, 4, 5), per_day=4).requests == 0
    # Two of the four requests were made at START, two a second later.
    clock.now = START + 24 * 3600
    summary = fetch(songs(1, 2, 3, 4, 5, 6), per_day=4)
    assert summary.requests == 2 and summary.used == 4 and ids_asked(seven)[4:] == [4, 5]
    clock.now += 1
    assert statuses(fetch(songs(6), per_day=4)) == {6: "not_found"}


def test_a_limit_within_the_tries_of_a_song(fetch, seven):
    seven.answers = {1: [(500, b"")]}
    summary = fetch(songs(1, 2), per_day=2)
    assert ids_asked(seven) == [1, 1] and summary.left == 2 and summary.pause
    assert summary.outcomes == {
        track(1): Outcome("failed", "HTTP 500"),
        track(2): Outcome("not_asked"),
    }


def test_no_more_than_4000_requests_a_day_by_default(fetch, seven, clock, tmp_path):
    assert previews.REQUESTS_PER_DAY == 4000
    book = tmp_path / "previews" / "requests.jsonl"
    book.parent.mkdir()
    lines = [ledger_line("2025-06-14T15:06:40")] + [ledger_line("2025-06-14T15:06:41")] * 3998
    book.write_text("\n".join(lines) + "\n")
    # The first line is exactly 24 hours old and no longer counts.
    assert fetch(songs(1, 2, 3)).requests == 2 and ids_asked(seven) == [1, 2]


def test_limit_is_songs_of_this_run(fetch, seven):
    seven.answers = {1: [(500, b""), (404, b"")]}
    summary = fetch(songs(1, 2, 3), limit=2)
    assert ids_asked(seven) == [1, 1, 2] and not summary.incomplete
    assert statuses(summary) == {1: "not_found", 2: "not_found", 3: "not_asked"}


def test_a_ledger_that_a_crash_cut_short(fetch, seven, clock, tmp_path):
    fetch(songs(1))
    book = tmp_path / "previews" / "requests.jsonl"
    intact = book.read_text()
    # Killed while waiting for the answer: the request counts, at its time, and the song is asked
    # for again.
    clock.now += 3600
    with book.open("a") as file:
        file.write(
            '{"time": "2025-06-15T16:06:40.000+00:00", '
            f'"track_id": "{track(2)}", "track_7digitalid": 2'
        )
    history = Ledger(book)
    assert history.times == [START, START + 3600] and history.last == {
        1: Outcome("not_found", "HTTP 404")
    }
    summary = fetch(songs(1, 2, 3), per_day=3)
    assert ids_asked(seven) == [1, 2] and summary.used == 3 and summary.pause
    lines = book.read_text().splitlines()
    assert (
        len(lines) == 3
        and lines[0] + "\n" == intact
        and json.loads(lines[2])["track_id"] == track(2)
    )


def test_damaged_lines_count_at_the_time_of_the_next(tmp_path):
    book = tmp_path / "requests.jsonl"
    good = ledger_line("2025-06-15T15:06:40")
    book.write_bytes(b'\x00\x00\xff{"ti\n' + good.encode() + b'\n\n5\n{"time": "yesterday"}\n')
    os.utime(book, (START + 50, START + 50))
    history = Ledger(book)
    assert history.times == [START, START, START + 50, START + 50] and list(history.last) == [9]


def test_stopped_within_a_request(fetch, seven, tmp_path, monkeypatch):
    seven.answers = {1: [(200, SOUND)]}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(previews, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch(songs(1, 2))
    monkeypatch.undo()
    (line,) = ledger_lines(tmp_path)
    assert (line["outcome"], line["detail"]) == ("failed", "interrupted")
    assert "interrupted" in (tmp_path / "previews" / "previews.csv").read_text()
    assert statuses(fetch(songs(1, 2))) == {1: "found", 2: "not_found"}


def test_a_request_is_on_the_disk_before_it_is_sent(fetch, seven, tmp_path):
    seen = []

    def look(handler):
        seen.append((tmp_path / "previews" / "requests.jsonl").read_text())
        handler.answer(200, SOUND)

    seven.answers = {1: [look]}
    fetch(songs(1))
    assert seen == [
        '{"time": "2025-06-15T15:06:40.000+00:00", '
        f'"track_id": "{track(1)}", "track_7digitalid": 1'
    ]
    assert Ledger(tmp_path / "previews" / "requests.jsonl").last == {
        1: Outcome("found", f"{len(SOUND)} bytes")
    }


def test_one_run_at_a_time_on_a_ledger(fetch, seven, tmp_path):
    with Ledger(tmp_path / "previews" / "requests.jsonl", 4000):
        with pytest.raises(
            UserError, match=r"requests\.jsonl: this ledger cannot be locked: another run"
        ):
            fetch(songs(1))
        assert seven.asked == [] and fetch(songs(1), ledger=tmp_path / "other.jsonl").requests == 1
    assert fetch(songs(2)).requests == 1


def test_no_request_that_the_ledger_cannot_note(fetch, seven, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(previews.os, "write", full)
    with pytest.raises(
        UserError,
        match=r"requests\.jsonl: the ledger of requests cannot be written \(No space left",
    ):
        fetch(songs(1))
    assert seven.asked == []


@pytest.mark.parametrize(
    ("header", "slept"),
    [
        ([("Retry-After", "7")], 7.0),
        ([("Retry-After", email.utils.formatdate(START + 30, usegmt=True))], 30.0),
        ([("X-RateLimit-Reset", "90"), ("X-RateLimit-Limit", "4000")], 90.0),
        ([("Retry-After", "soon")], 1.0),
        ([], 1.0),
    ],
)
def test_how_long_it_waits_after_429(fetch, seven, clock, header, slept):
    seven.answers = {1: [(429, b"", header), (200, SOUND)]}
    assert statuses(fetch(songs(1))) == {1: "found"} and clock.slept == [slept]


def test_the_reset_of_the_day_matters_only_after_429(fetch, seven, clock):
    seven.answers = {
        1: [
            (503, b"", [("X-RateLimit-Reset", "40000")]),
            (502, b"", [("Retry-After", "2")]),
            (200, SOUND),
        ]
    }
    assert statuses(fetch(songs(1))) == {1: "found"} and clock.slept == [1.0, 2.0]


def test_a_long_pause_ends_the_run(fetch, seven, clock):
    seven.answers = {1: [(429, b"", [("Retry-After", "7200")])]}
    summary = fetch(songs(1, 2))
    assert clock.slept == [] and ids_asked(seven) == [1] and summary.incomplete
    assert (
        summary.lines()[-1]
        == "7digital asks for a pause (HTTP 429). Resume after 2025-06-15 17:07 UTC: 2 songs are "
        "left."
    )
    seven.answers = {1: [(429, b"")]}
    summary = fetch(songs(1, 2), back_off=(1.0, 2.0))
    assert clock.slept == [1.0, 2.0] and "does not say until when" in summary.pause


def test_cut_connections_and_timeouts_are_tried_again(fetch, seven, clock, tmp_path):
    seven.answers = {1: [cut, drop, stall, (200, SOUND)]}
    assert statuses(fetch(songs(1), timeout=0.3)) == {1: "found"} and clock.slept == [
        1.0,
        4.0,
        16.0,
    ]
    assert [line["detail"] for line in ledger_lines(tmp_path)] == [
        "the connection was cut within the response",
        "no connection, or it was cut",
        "timed out",
        f"{len(SOUND)} bytes",
    ]
    seven.answers[2] = [cut]
    summary = fetch(songs(2))
    assert summary.outcomes[track(2)] == Outcome(
        "failed", "the connection was cut within the response"
    )
    assert (
        ids_asked(seven).count(2) == 4 and not (tmp_path / "previews" / f"{track(2)}.mp3").exists()
    )


def wav():
    data = io.BytesIO()
    soundfile.write(data, np.zeros(2000), 22050, format="WAV")
    return data.getvalue()


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "an empty response"),
        (
            b'\xef\xbb\xbf\n <?xml version="1.0"?><response status="error"/>',
            "a web page or XML instead of audio",
        ),
        (b'{"status": "error"}', "JSON instead of audio"),
        (b"\x00\x01\x02" * 500, "no mp3 that can be decoded"),
        (wav(), "WAV, not mp3"),
        (bytes(2**16) * 170, "more than 10 MB"),
    ],
)
def test_an_answer_that_is_no_sound_is_not_kept(fetch, seven, tmp_path, body, detail):
    seven.answers = {1: [(200, body)]}
    assert fetch(songs(1)).outcomes[track(1)] == Outcome("no_audio", detail)
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == [
        "previews.csv",
        "requests.jsonl",
    ]


def test_redirects_are_followed_and_counted(fetch, seven, tmp_path):
    seven.answers = {
        1: [(302, b"", [("Location", "/media/1.mp3")])],
        2: [lambda handler: handler.answer(302, b"", [("Location", handler.path)])],
    }
    summary = fetch(songs(1))
    assert (
        statuses(summary) == {1: "found"}
        and summary.requests == 2
        and seven.asked[1] == "/media/1.mp3"
    )
    assert [line["outcome"] for line in ledger_lines(tmp_path)] == ["redirected", "found"]
    # The same signed address a second time is refused, as 7digital would.
    assert fetch(songs(2)).outcomes[track(2)] == Outcome("failed", "HTTP 401, refused")
    seven.answers[3] = [(302, b"", [("Location", "ftp://127.0.0.1/x")])]
    assert fetch(songs(3)).outcomes[track(3)] == Outcome("failed", "InvalidSchema")


def test_the_country_is_signed_too(fetch, seven):
    seven.answers = {1: [(200, SOUND)]}
    assert statuses(fetch(songs(1), country="GB")) == {1: "found"}
    assert ("country", "GB") in parse_qsl(urlsplit(seven.asked[0]).query)


def test_wrong_keys_end_the_run_and_stay_secret(fetch, seven, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = Keys(KEY, "wr0ng-secret")
    assert KEY not in repr(wrong) and "wr0ng" not in repr(wrong)
    with pytest.raises(
        UserError, match=r"5 songs in a row failed.*HTTP 401, refused.*MUSICGENRE_7DIGITAL_SECRET"
    ) as error:
        fetch(songs(*range(1, 9)), keys=wrong)
    assert ids_asked(seven) == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="no connection") as unreachable:
        fetch(songs(*range(11, 19)), keys=wrong, base_url="http://127.0.0.1:9/clip", back_off=())
    written = "".join(path.read_text() for path in (tmp_path / "previews").iterdir())
    for text in (str(error.value), str(unreachable.value), caplog.text, written):
        assert "wr0ng" not in text and KEY not in text and "oauth_signature=" not in text


def test_failures_that_others_part_do_not_end_the_run(fetch, seven):
    seven.answers = {n: [(403, b"")] for n in (1, 2, 3, 4, 6, 7, 8, 9)}
    assert fetch(songs(*range(1, 11))).requests == 10


@pytest.mark.parametrize(
    ("key", "secret", "named"),
    [
        (None, None, "MUSICGENRE_7DIGITAL_KEY and MUSICGENRE_7DIGITAL_SECRET are not set"),
        ("k", " ", "^MUSICGENRE_7DIGITAL_SECRET is not set"),
    ],
)
def test_keys_come_from_the_environment(monkeypatch, key, secret, named):
    for name, value in (("MUSICGENRE_7DIGITAL_KEY", key), ("MUSICGENRE_7DIGITAL_SECRET", secret)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        keys_from_environment()
    monkeypatch.setenv("MUSICGENRE_7DIGITAL_KEY", "k")
    monkeypatch.setenv("MUSICGENRE_7DIGITAL_SECRET", " s\n")
    assert keys_from_environment() == Keys("k", "s")


def test_mistakes(fetch, monkeypatch):
    with pytest.raises(
        UserError,
        match=r"--base_url='previews\.7digital\.com' does not begin with https:// or http://",
    ):
        fetch(songs(1), base_url="previews.7digital.com")
    with pytest.raises(UserError, match="at least 1, not 0"):
        fetch(songs(1), per_day=0)
    monkeypatch.setitem(sys.modules, "requests_oauthlib", None)
    with pytest.raises(UserError, match=r"requests-oauthlib.*pip install 'musicgenre\[msd\]'"):
        fetch(songs(1))


def write_summary(path, numbers):
    """Writes the columns of a summary file that are read."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (the extra msd)")
    text = [(name, "S64") for name in ("title", "song_id", "artist_name", "artist_id", "release")]
    shop = [(f"{what}_7digitalid", "<i4") for what in ("track", "release", "artist")]
    metadata = np.zeros(len(numbers), text + shop)
    analysis = np.zeros(len(numbers), [("track_id", "S32"), ("duration", "<f8")])
    metadata["track_7digitalid"] = list(numbers.values())
    analysis["track_id"] = list(numbers)
    with h5py.File(path, "w") as file:
        for group, table in (
            ("metadata", metadata),
            ("analysis", analysis),
            ("musicbrainz", np.zeros(len(numbers), [("year", "<i4")])),
        ):
            file.create_group(group)["songs"] = table


def test_songs_of_a_data_set(tmp_path):
    write_summary(tmp_path / "a.h5", {track(1): 0, track(2): 2})
    write_summary(tmp_path / "b.h5", {track(1): 1, track(2): -1, track(3): -1})
    (tmp_path / "c.h5").write_bytes(b"")
    wanted = previews.wanted_songs(tmp_path)
    # An id counts, whichever file has it.
    assert wanted.numbers == {track(1): 1, track(2): 2, track(3): -1}
    assert [type(entry) for entry in wanted.skipped] == [Skipped] and wanted.skipped[0].path == str(
        tmp_path / "c.h5"
    )
    with pytest.raises(
        UserError,
        match=r"no song in its \.h5 files, 1 of which cannot be used; the first is .*c\.h5",
    ):
        previews.wanted_songs(tmp_path / "c.h5")


def test_the_script(seven, tmp_path):
    write_summary(tmp_path / "all.h5", songs(1, 2, 3) | {track(4): -1})
    seven.answers = {1: [(200, SOUND)], 3: [(200, SOUND)]}
    outputs = []

    def run(*arguments, keys=True):
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MUSICGENRE_")
        }
        if keys:
            environment |= {"MUSICGENRE_7DIGITAL_KEY": KEY, "MUSICGENRE_7DIGITAL_SECRET": SECRET}
        script = [
            sys.executable,
            str(ROOT / "experiments" / "fetch_previews.py"),
            f"--root={tmp_path}",
            "--noprogress",
        ]
        done = subprocess.run(
            [*script, f"--base_url={seven.url}", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        outputs.append(done.stdout + done.stderr)
        return done

    done = run(keys=False)
    assert done.returncode == 2 and re.match(
        "error: MUSICGENRE_7DIGITAL_KEY and .* are not set", done.stderr
    )
    done = run("--dry_run", keys=False)
    assert done.returncode == 0 and not (tmp_path / "previews").exists() and seven.asked == []
    assert (
        "4 songs: 0 found, 0 not found, 0 no audio, 0 failed, 1 no id, 3 not asked." in done.stdout
    )
    assert "would ask for 3 songs; 4000 of 4000 requests are free." in done.stdout
    done = run("--per_day=2", "--verbosity=1")
    assert done.returncode == 3 and re.search(
        r"Resume after .* UTC: 1 songs are left\.$", done.stdout.strip()
    )
    plan = previews.plan_lines(tmp_path, songs(1, 2, 3), per_day=3)
    assert plan[1] == "would ask for 1 songs; 1 of 3 requests are free."
    (tmp_path / "bad.h5").write_bytes(b"no")
    done = run("--per_day=3")
    assert (
        done.returncode == 0 and "2 previews of 3 songs with a 7digital id (1 new)" in done.stdout
    )
    assert done.stderr.startswith(f"skipped {tmp_path}/bad.h5: not an HDF5 file")
    assert ids_asked(seven) == [1, 2, 3]
    written = [
        path.read_text() for path in (tmp_path / "previews").iterdir() if path.suffix != ".mp3"
    ]
    assert len(written) == 2
    for text in outputs + written:
        assert SECRET not in text and KEY not in text and "Traceback" not in text
