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

from musicgenre.datasets.fetch import previews
from musicgenre.datasets.fetch.previews import Keys, Ledger, Outcome, fetch_previews
from musicgenre.errors import UserError

pytest.importorskip("requests_oauthlib", reason="needs requests-oauthlib (the extra msd)")

ROOT = Path(__file__).resolve().parents[3]
KEY, SECRET = "key-of-the-test", "s3cret & with/odd=signs"
KEYS = Keys(KEY, SECRET)
START = 1_750_000_000.0
FULL = OSError(28, "No space left on device")


def sound(container):
    data = io.BytesIO()
    soundfile.write(data, 0.3 * np.sin(np.arange(22050) / 20), 22050, format=container)
    return data.getvalue()


SOUND = sound("MP3")


def track(number):
    return f"TR{number:016d}"


def songs(*numbers):
    return {track(number): number for number in numbers}


def signature_is_right(target, host, nonces):
    """Computes the signature of RFC 5849 independently and compares the request's with it."""
    parts = urlsplit(target)
    values = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True))
    signature = values.pop("oauth_signature", None)
    pairs = sorted((quote(k, safe="~"), quote(v, safe="~")) for k, v in values.items())
    joined = "&".join(f"{k}={v}" for k, v in pairs)
    text = "&".join(("GET", quote(f"http://{host}{parts.path}", safe=""), quote(joined, safe="")))
    digest = hmac.new(f"{quote(SECRET, safe='')}&".encode(), text.encode(), hashlib.sha1).digest()
    fresh = abs(time.time() - int(values["oauth_timestamp"])) < 300
    fresh &= values["oauth_nonce"] not in nonces
    nonces.add(values["oauth_nonce"])
    method = [values[f"oauth_{name}"] for name in ("signature_method", "version", "consumer_key")]
    right = signature == base64.b64encode(digest).decode()
    return right and fresh and method == ["HMAC-SHA1", "1.0", KEY]


def sign_and_answer(handler):
    server, path = handler.server, urlsplit(handler.path).path
    server.asked.append(handler.path)
    if not path.startswith("/clip/"):
        return handler.answer(200, SOUND)
    if not signature_is_right(handler.path, handler.headers["Host"], server.nonces):
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
def folder(tmp_path):
    return tmp_path / "previews"


@pytest.fixture
def book(folder):
    """The ledger's path."""
    folder.mkdir()
    return folder / "requests.jsonl"


@pytest.fixture
def fetch(seven, clock, tmp_path):
    def run(numbers, keys=KEYS, **options):
        options = {"base_url": seven.url, "progress": False, **options}
        return fetch_previews(tmp_path, numbers, keys, **options)

    return run


def ids_asked(seven):
    return [int(urlsplit(path).path.rsplit("/", 1)[1]) for path in seven.asked]


def ledger_lines(folder):
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def ledger_line(time):
    entry = {"time": f"{time}+00:00", "track_id": "x", "track_7digitalid": 9}
    return json.dumps(entry | {"outcome": "found", "detail": ""}) + "\n"


def statuses(summary):
    """The status of each song, in order."""
    return [outcome.status for outcome in summary.outcomes.values()]


def test_songs_are_found_or_not_and_listed(fetch, seven, clock, folder):
    seven.answers = {1: [(200, SOUND)], 3: [(500, b"oops"), (200, SOUND)], 4: [(200, b"<html>")]}
    summary = fetch(songs(1, 2, 3, 4) | {track(5): 0, track(6): -1})
    assert statuses(summary) == ["found", "not_found", "found", "no_audio", "no_id", "no_id"]
    names = [f"{track(1)}.mp3", f"{track(3)}.mp3", "previews.csv", "requests.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / names[0]).read_bytes() == SOUND
    assert ids_asked(seven) == [1, 2, 3, 3, 4] and clock.slept == [1.0]
    no_mp3, found = "no mp3 but 6 bytes of unknown type", f"{len(SOUND)} bytes"
    assert list(csv.reader((folder / "previews.csv").open())) == [
        ["track_id", "track_7digitalid", "status", "detail"],
        [track(1), "1", "found", ""],
        [track(2), "2", "not_found", "HTTP 404"],
        [track(3), "3", "found", ""],
        [track(4), "4", "no_audio", no_mp3],
        [track(5), "0", "no_id", ""],
        [track(6), "-1", "no_id", ""],
    ]
    lines = ledger_lines(folder)
    assert [(line["track_id"], line["outcome"], line["detail"]) for line in lines] == [
        (track(1), "found", found),
        (track(2), "not_found", "HTTP 404"),
        (track(3), "failed", "HTTP 500"),
        (track(3), "found", found),
        (track(4), "no_audio", no_mp3),
    ]
    assert lines[0]["time"] == "2025-06-15T15:06:40.000+00:00"
    assert summary.lines() == [
        f"{folder}: 2 previews of 4 songs with a 7digital id (2 new); 1 not found, 1 answered "
        "without audio, 0 failed, 0 not asked for yet; 2 songs have no id.",
        "5 requests in this run, 5 of 4000 in the last 24 hours; all songs are listed in "
        f"{folder}/previews.csv.",
        f"  {track(4)}: no_audio ({no_mp3})",
    ]
    assert not summary.incomplete


def test_a_second_run_asks_only_for_what_is_open(fetch, seven, folder):
    seven.answers = {1: [(200, SOUND)], 3: [(200, b"{}"), (200, SOUND)], 4: [(403, b"")]}
    fetch(songs(1, 2, 3, 4))
    seven.asked.clear()
    # A new song comes before those that failed.
    summary = fetch(songs(1, 2, 3, 4, 5))
    assert ids_asked(seven) == [5, 3, 4] and summary.incomplete
    assert statuses(summary) == ["found", "not_found", "found", "failed", "not_found"]
    assert "2 previews of 5 songs with a 7digital id (1 new)" in summary.lines()[0]
    seven.asked.clear()
    seven.answers[2] = [(200, SOUND)]
    summary = fetch(songs(1, 2, 3), retry_missing=True)
    assert ids_asked(seven) == [2] and statuses(summary)[1] == "found"
    seven.asked.clear()
    (folder / f"{track(1)}.mp3").unlink()
    fetch(songs(1, 2, 3))
    assert ids_asked(seven) == [1]


def test_the_daily_limit_counts_retries_and_the_last_24_hours(fetch, seven, clock):
    seven.answers = {n: [(200, SOUND)] for n in (1, 3, 4, 5)} | {2: [(503, b""), (200, SOUND)]}
    summary = fetch(songs(1, 2, 3, 4, 5), per_day=4)
    # 1, 2, 2 again after a second, 3.
    assert ids_asked(seven) == [1, 2, 2, 3] and summary.incomplete and summary.left == 2
    used_up = "The 4 requests of 24 hours are used up. Resume after 2025-06-16 15:07 UTC: 2 songs"
    assert summary.lines()[-1] == f"{used_up} are left."
    assert statuses(summary) == ["found"] * 3 + ["not_asked"] * 2
    clock.now = START + 24 * 3600 - 1
    assert fetch(songs(1, 2, 3, 4, 5), per_day=4).requests == 0
    # Two of the four requests were made at START, two a second later.
    clock.now = START + 24 * 3600
    summary = fetch(songs(1, 2, 3, 4, 5, 6), per_day=4)
    assert summary.requests == 2 and summary.used == 4 and ids_asked(seven)[4:] == [4, 5]
    clock.now += 1
    assert statuses(fetch(songs(6), per_day=4)) == ["not_found"]


def test_the_limits_of_a_day_and_of_a_run(fetch, seven):
    seven.answers = {1: [(500, b"")], 3: [(500, b""), (404, b"")]}
    summary = fetch(songs(1, 2), per_day=2)
    assert ids_asked(seven) == [1, 1] and summary.left == 2 and summary.pause
    assert list(summary.outcomes.values()) == [Outcome("failed", "HTTP 500"), Outcome("not_asked")]
    # The limit of a run counts songs, not requests.
    seven.asked.clear()
    summary = fetch(songs(3, 4, 5), limit=2)
    assert ids_asked(seven) == [3, 3, 4] and not summary.incomplete
    assert statuses(summary) == ["not_found", "not_found", "not_asked"]


def test_no_more_than_4000_requests_a_day_by_default(fetch, seven, book):
    lines = [ledger_line("2025-06-14T15:06:40"), *[ledger_line("2025-06-14T15:06:41")] * 3998]
    book.write_text("".join(lines))
    # The first line is exactly 24 hours old and no longer counts.
    assert fetch(songs(1, 2, 3)).requests == 2 and ids_asked(seven) == [1, 2]


def test_a_ledger_that_a_crash_cut_short(fetch, seven, clock, book):
    fetch(songs(1))
    first = book.read_text()
    # Killed while waiting for the answer: the request counts, at its time, and the song is asked
    # for again.
    clock.now += 3600
    entry = {"time": "2025-06-15T16:06:40.000+00:00", "track_id": track(2), "track_7digitalid": 2}
    with book.open("a") as file:
        file.write(json.dumps(entry)[:-1])
    history = Ledger(book)
    assert history.times == [START, START + 3600]
    assert history.last == {1: Outcome("not_found", "HTTP 404")}
    summary = fetch(songs(1, 2, 3), per_day=3)
    assert ids_asked(seven) == [1, 2] and summary.used == 3 and summary.pause
    lines = book.read_text().splitlines()
    assert len(lines) == 3 and lines[0] + "\n" == first
    assert json.loads(lines[2])["track_id"] == track(2)


def test_damaged_lines_count_at_the_time_of_the_last_change(book):
    good = ledger_line("2025-06-15T15:06:40").encode()
    book.write_bytes(b'\x00\x00\xff{"ti\n' + good + b'\n\n5\n{"time": "yesterday"}\n')
    os.utime(book, (START + 50, START + 50))
    history = Ledger(book)
    assert history.times == [START, *[START + 50] * 3] and list(history.last) == [9]


def test_stopped_within_a_request(fetch, seven, folder, monkeypatch):
    seven.answers = {1: [(200, SOUND)]}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(previews, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch(songs(1, 2))
    monkeypatch.undo()
    (line,) = ledger_lines(folder)
    assert (line["outcome"], line["detail"]) == ("failed", "interrupted")
    assert "interrupted" in (folder / "previews.csv").read_text()
    assert statuses(fetch(songs(1, 2))) == ["found", "not_found"]


def test_a_request_is_on_the_disk_before_it_is_sent(fetch, seven, book):
    seen = []

    def look(handler):
        seen.append(book.read_text())
        handler.answer(200, SOUND)

    seven.answers = {1: [look]}
    fetch(songs(1))
    entry = {"time": "2025-06-15T15:06:40.000+00:00", "track_id": track(1), "track_7digitalid": 1}
    assert seen == [json.dumps(entry)[:-1]]
    assert Ledger(book).last == {1: Outcome("found", f"{len(SOUND)} bytes")}


def test_one_run_at_a_time_on_a_ledger(fetch, seven, book, tmp_path):
    with Ledger(book):
        message = r"requests\.jsonl: this ledger cannot be locked: another run"
        with pytest.raises(UserError, match=message):
            fetch(songs(1))
        assert seven.asked == [] and fetch(songs(1), ledger=tmp_path / "other.jsonl").requests == 1
    assert fetch(songs(2)).requests == 1


def test_no_request_that_the_ledger_cannot_record(fetch, seven, monkeypatch):
    def full(*_):
        raise FULL

    monkeypatch.setattr(previews.os, "write", full)
    with pytest.raises(UserError, match=r"requests\.jsonl: the ledger .* written \(No space left"):
        fetch(songs(1))
    assert seven.asked == []


@pytest.mark.parametrize(
    ("answers", "slept"),
    [
        ([(429, b"", [("Retry-After", "7")])], [7.0]),
        ([(429, b"", [("Retry-After", email.utils.formatdate(START + 30, usegmt=True))])], [30.0]),
        ([(429, b"", [("X-RateLimit-Reset", "90"), ("X-RateLimit-Limit", "4000")])], [90.0]),
        ([(429, b"", [("Retry-After", "soon")])], [1.0]),
        ([(429, b"")], [1.0]),
        # The reset of the day matters only after 429.
        (
            [(503, b"", [("X-RateLimit-Reset", "40000")]), (502, b"", [("Retry-After", "2")])],
            [1, 2],
        ),
    ],
)
def test_how_long_it_waits_before_the_next_attempt(fetch, seven, clock, answers, slept):
    seven.answers = {1: [*answers, (200, SOUND)]}
    assert statuses(fetch(songs(1))) == ["found"] and clock.slept == slept


def test_a_long_pause_ends_the_run(fetch, seven, clock):
    seven.answers = {1: [(429, b"", [("Retry-After", "7200")])]}
    summary = fetch(songs(1, 2))
    assert clock.slept == [] and ids_asked(seven) == [1] and summary.incomplete
    wanted = "7digital asks for a pause (HTTP 429). Resume after 2025-06-15 17:07 UTC: 2 songs"
    assert summary.lines()[-1] == f"{wanted} are left."
    seven.answers = {1: [(429, b"")]}
    summary = fetch(songs(1, 2), back_off=(1.0, 2.0))
    assert clock.slept == [1.0, 2.0] and "does not say until when" in summary.pause


def test_cut_connections_and_timeouts_are_tried_again(fetch, seven, clock, folder):
    seven.answers = {1: [cut, drop, stall, (200, SOUND)], 2: [cut]}
    assert statuses(fetch(songs(1), timeout=0.3)) == ["found"] and clock.slept == [1.0, 4.0, 16.0]
    details = [line["detail"] for line in ledger_lines(folder)]
    assert details[:2] == ["ChunkedEncodingError", "ConnectionError"]
    assert details[2:] == ["ReadTimeout", f"{len(SOUND)} bytes"]
    outcomes = fetch(songs(2)).outcomes
    assert outcomes == {track(2): Outcome("failed", "ChunkedEncodingError")}
    assert ids_asked(seven).count(2) == 4 and not (folder / f"{track(2)}.mp3").exists()


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "no mp3 but 0 bytes of text/x"),
        (b'<?xml version="1.0"?>', "no mp3 but 21 bytes of text/x"),
        (b"\x00\x01\x02" * 500, "no mp3 but 1500 bytes of text/x"),
        (sound("WAV"), "no mp3 but 44144 bytes of text/x"),
        (bytes(2**16) * 170, "more than 10 MB"),
    ],
    ids=["empty", "XML", "noise", "WAV", "large"],
)
def test_an_answer_that_is_no_sound_is_not_kept(fetch, seven, folder, body, detail):
    seven.answers = {1: [(200, body, [("Content-Type", "text/x")])]}
    assert fetch(songs(1)).outcomes[track(1)] == Outcome("no_audio", detail)
    assert sorted(path.name for path in folder.iterdir()) == ["previews.csv", "requests.jsonl"]


def test_redirects_are_followed_and_counted(fetch, seven, folder):
    seven.answers = {
        1: [(302, b"", [("Location", "/media/1.mp3")])],
        2: [lambda handler: handler.answer(302, b"", [("Location", handler.path)])],
        3: [(302, b"", [("Location", "ftp://127.0.0.1/x")])],
    }
    summary = fetch(songs(1))
    assert statuses(summary) == ["found"] and summary.requests == 2
    assert seven.asked[1] == "/media/1.mp3"
    assert [line["outcome"] for line in ledger_lines(folder)] == ["redirected", "found"]
    # The same signed address a second time is refused, as 7digital would.
    assert fetch(songs(2)).outcomes[track(2)] == Outcome("failed", "HTTP 401, refused")
    assert fetch(songs(3)).outcomes[track(3)] == Outcome("failed", "InvalidSchema")


def test_the_country_is_signed_too(fetch, seven):
    seven.answers = {1: [(200, SOUND)]}
    assert statuses(fetch(songs(1), country="GB")) == ["found"]
    assert ("country", "GB") in parse_qsl(urlsplit(seven.asked[0]).query)


def test_wrong_keys_end_the_run_and_stay_secret(fetch, seven, folder, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = Keys(KEY, "wr0ng-secret")
    assert KEY not in repr(wrong) and "wr0ng" not in repr(wrong)
    message = r"5 songs in a row failed.*HTTP 401, refused.*MUSICGENRE_7DIGITAL_SECRET"
    with pytest.raises(UserError, match=message) as error:
        fetch(songs(*range(1, 9)), keys=wrong)
    assert ids_asked(seven) == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="ConnectionError") as unreachable:
        fetch(songs(*range(11, 19)), keys=wrong, base_url="http://127.0.0.1:9/clip", back_off=())
    written = "".join(path.read_text() for path in folder.iterdir())
    for text in (str(error.value), str(unreachable.value), caplog.text, written):
        assert "wr0ng" not in text and KEY not in text and "oauth_signature=" not in text


def test_failures_that_others_separate_do_not_end_the_run(fetch, seven):
    seven.answers = {n: [(403, b"")] for n in (1, 2, 3, 4, 6, 7, 8, 9)}
    assert fetch(songs(*range(1, 11))).requests == 10


def test_keys_come_from_the_environment(monkeypatch):
    names = (previews.KEY_VARIABLE, previews.SECRET_VARIABLE)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=f"{names[0]} and {names[1]} are not set"):
        previews.keys_from_environment()
    monkeypatch.setenv(names[0], "k")
    monkeypatch.setenv(names[1], " ")
    with pytest.raises(UserError, match=f"^{names[1]} is not set"):
        previews.keys_from_environment()
    monkeypatch.setenv(names[1], " s\n")
    assert previews.keys_from_environment() == Keys("k", "s")


def test_mistakes(fetch, monkeypatch):
    with pytest.raises(UserError, match=r"--base_url='7digital\.com' does not begin with https://"):
        fetch(songs(1), base_url="7digital.com")
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
    tables = {
        "metadata": np.zeros(len(numbers), text + shop),
        "analysis": np.zeros(len(numbers), [("track_id", "S32"), ("duration", "<f8")]),
        "musicbrainz": np.zeros(len(numbers), [("year", "<i4")]),
    }
    tables["metadata"]["track_7digitalid"] = list(numbers.values())
    tables["analysis"]["track_id"] = list(numbers)
    with h5py.File(path, "w") as file:
        for group, table in tables.items():
            file.create_group(group)["songs"] = table


def test_songs_of_a_data_set(tmp_path):
    write_summary(tmp_path / "a.h5", {track(1): 0, track(2): 2})
    write_summary(tmp_path / "b.h5", {track(1): 1, track(2): -1, track(3): -1})
    (tmp_path / "c.h5").write_bytes(b"")
    wanted = previews.wanted_songs(tmp_path)
    # An id counts, whichever file has it.
    assert wanted.numbers == {track(1): 1, track(2): 2, track(3): -1}
    assert [entry.path for entry in wanted.skipped] == [str(tmp_path / "c.h5")]
    message = r"no song in its \.h5 files, 1 of which cannot be used; the first is .*c\.h5"
    with pytest.raises(UserError, match=message):
        previews.wanted_songs(tmp_path / "c.h5")


def test_the_script(seven, folder, tmp_path):
    write_summary(tmp_path / "all.h5", songs(1, 2, 3) | {track(4): -1})
    seven.answers = {1: [(200, SOUND)], 3: [(200, SOUND)]}
    script = [sys.executable, str(ROOT / "experiments" / "fetch_previews.py")]
    flags = [f"--root={tmp_path}", "--noprogress", f"--base_url={seven.url}"]
    without = {k: v for k, v in os.environ.items() if not k.startswith("MUSICGENRE_")}
    keys = {"MUSICGENRE_7DIGITAL_KEY": KEY, "MUSICGENRE_7DIGITAL_SECRET": SECRET}
    outputs = []

    def run(code, *more, env=without | keys):
        command = [*script, *flags, *more]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        outputs.append(done.stdout + done.stderr)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    assert re.match("error: MUSICGENRE_7DIGITAL_KEY and .* are not set", run(2, env=without)[1])
    out, _ = run(0, "--dry_run", env=without)
    assert not folder.exists() and seven.asked == []
    assert "4 songs: 0 found, 0 not found, 0 no audio, 0 failed, 1 no id, 3 not asked." in out
    assert "would ask for 3 songs; 4000 of 4000 requests are free." in out
    out, _ = run(3, "--per_day=2", "--verbosity=1")
    assert re.search(r"Resume after .* UTC: 1 songs are left\.$", out.strip())
    plan = previews.plan_lines(tmp_path, songs(1, 2, 3), per_day=3)
    assert plan[1] == "would ask for 1 songs; 1 of 3 requests are free."
    (tmp_path / "bad.h5").write_bytes(b"no")
    out, err = run(0, "--per_day=3")
    assert "2 previews of 3 songs with a 7digital id (1 new)" in out
    assert err.startswith(f"skipped {tmp_path}/bad.h5: not an HDF5 file")
    assert ids_asked(seven) == [1, 2, 3]
    written = [path.read_text() for path in folder.iterdir() if path.suffix != ".mp3"]
    assert len(written) == 2
    for text in outputs + written:
        assert SECRET not in text and KEY not in text and "Traceback" not in text
