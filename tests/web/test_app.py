import base64
import dataclasses
import errno
import http.client
import io
import socket
import threading
import time

import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi", reason="the extra demo is not installed")
pytest.importorskip("httpx2", reason="the tests of the page need httpx2")

from fastapi.testclient import TestClient
from tiny_model import tiny_model

from musicgenre import Tagger
from musicgenre.inference.index import Neighbour
from musicgenre.web import analysis, app
from musicgenre.web.app import NAME_HEADER, Limits, create_app


@pytest.fixture(scope="module")
def tagger():
    return Tagger(tiny_model())


def sound(samples=None, *, seconds=4.0, rate=22050, form="wav", seed=0):
    """The bytes of a sound file; noise if no samples are given."""
    if samples is None:
        samples = 0.1 * np.random.default_rng(seed).standard_normal(int(rate * seconds))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form)
    return file.getvalue()


def client_of(tagger, index=None, limits=None, **keywords):
    return TestClient(
        create_app(tagger, index, limits, **keywords), base_url="http://127.0.0.1:8000"
    )


def post(client, content, name="song.wav", **headers):
    return client.post("/api/tag", content=content, headers={NAME_HEADER: name, **headers})


def uploads(client):
    return list(client.app.state.folder.iterdir())


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Index:
    """A stand-in for an index that remembers what it was asked."""

    asked = None

    def search(self, embedding, k, exclude=None):
        self.asked = embedding
        paths = (f"/home/somebody/music/album {i}/{i}.flac" for i in range(k))
        return [Neighbour(path, 1 - i / 10) for i, path in enumerate(paths)]


def test_the_answer_is_what_the_tagger_says(tagger, tmp_path):
    path = tmp_path / "song.ogg"
    samples = 0.1 * np.random.default_rng(1).standard_normal((4 * 44100, 2))
    path.write_bytes(sound(samples, rate=44100, form="ogg"))
    with client_of(tagger) as client:
        answer = post(client, path.read_bytes(), "My%20s%C3%B6ng.ogg")
        assert answer.status_code == 200 and uploads(client) == []
    found = answer.json()
    assert found["file"] == "My söng.ogg"
    assert found["neighbours"] is None
    assert found["seconds"] == 4.0
    assert [tuple(entry.values()) for entry in found["labels"]] == list(
        map(tuple, tagger.tag(path))
    )
    # Eight windows of 64 frames in a window's length.
    expected = tagger.taggram(path, step_seconds=8 * 512 / 22050)
    assert found["taggram"]["labels"] == list(tagger.labels) and len(expected.starts) == 15
    for name in ("starts", "ends", "probabilities"):
        np.testing.assert_allclose(found["taggram"][name], getattr(expected, name), atol=6e-5)


def test_a_long_file_has_fewer_windows_in_a_window_and_no_more_columns(
    tagger, tmp_path, monkeypatch
):
    monkeypatch.setattr(analysis, "_WINDOWS", 10)
    monkeypatch.setattr(analysis, "COLUMNS", 100)
    path = tmp_path / "song.wav"
    path.write_bytes(sound(seconds=12.0))
    found = analysis.analyse(tagger, path, "song", max_seconds=60)
    # 516 hops in steps of 52 frames, and a window of 64 that ends with the file.
    steps = np.diff(found["taggram"]["starts"])
    np.testing.assert_allclose(steps[:-1], 52 * 512 / 22050, atol=1e-4)
    assert len(found["taggram"]["starts"]) == 10
    picture = found["spectrogram"]
    assert 50 <= picture["columns"] <= 100
    assert picture["columns"] * picture["seconds"] == pytest.approx(12, abs=2 * picture["seconds"])


def test_the_spectrogram_has_the_tone_in_its_band_and_time(tagger, tmp_path):
    # Quiet noise, and from 1 to 2 s a tone of 1 kHz.
    time_s = np.arange(4 * 22050) / 22050
    samples = np.where((time_s >= 1) & (time_s < 2), 0.5 * np.sin(2 * np.pi * 1000 * time_s), 0)
    samples += 1e-4 * np.random.default_rng(0).standard_normal(len(samples))
    path = tmp_path / "tone.wav"
    soundfile.write(path, samples, 22050, subtype="FLOAT")
    picture = analysis.analyse(tagger, path, "tone", max_seconds=60)["spectrogram"]
    levels = np.frombuffer(base64.b64decode(picture["levels"]), np.uint8)
    levels = levels.reshape(picture["columns"], picture["bands"])
    loud = np.flatnonzero(levels.max(axis=1) > 250)
    edges = picture["start"] + picture["seconds"] * np.array([loud[0], loud[-1] + 1])
    np.testing.assert_allclose(edges, [1, 2], atol=0.08)
    assert levels.max() == 255 and np.median(levels) < 120 and picture["floor"] == -80
    positions = {hertz: position for position, hertz in picture["ticks"]}
    assert abs(levels[loud[len(loud) // 2]].argmax() - positions["1000"]) <= 1


@pytest.mark.parametrize("crops", [False, True])
def test_the_nearest_files_are_those_of_the_embedding(tagger, tmp_path, crops):
    index = Index()
    if crops:
        tagger = Tagger(tiny_model(data__frames=128, data__crop_frames=64, data__eval_chunks=2))
    path = tmp_path / "a.wav"
    path.write_bytes(sound(seconds=4.0))
    found = analysis.analyse(tagger, path, "a.wav", max_seconds=60, index=index)
    np.testing.assert_allclose(index.asked, tagger.embed(path), atol=1e-6)
    assert len(found["neighbours"]) == 8
    assert found["neighbours"][1] == {"file": "album 1/1.flac", "similarity": 0.9}
    assert [tuple(entry.values()) for entry in found["labels"]] == list(
        map(tuple, tagger.tag(path))
    )


def test_a_regression_keeps_its_order(tmp_path):
    tagger = Tagger(tiny_model("regression", ("x", "y", "z")))
    with client_of(tagger) as client:
        labels = post(client, sound(seconds=1.4)).json()["labels"]
        assert client.get("/api/model").json()["task"] == "regression"
    assert [entry["label"] for entry in labels] == ["x", "y", "z"]
    assert min(entry["probability"] for entry in labels) < 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a b.mp3: empty file"),
        (b"no music at all", "a b.mp3: not a sound file that can be decoded"),
        (sound(np.zeros(40_000)), "a b.mp3: silent"),
        (sound(seconds=0.5), "a b.mp3: too short (0.50 s; at least 1 s are needed)"),
        (sound()[:50_000], "a b.mp3: truncated"),
        (sound(seconds=9), "a b.mp3: longer than the 8 s of sound"),
    ],
)
def test_a_bad_file_says_why_by_its_own_name_and_is_removed(tagger, content, message):
    with client_of(tagger, limits=Limits(max_seconds=8)) as client:
        answer = post(client, content, "a%20b.mp3")
        assert answer.status_code == 422 and answer.json()["error"].startswith(message)
        assert str(client.app.state.folder) not in answer.text and uploads(client) == []


@pytest.mark.parametrize("rate", [8000, 1])
def test_a_long_file_that_hides_its_length_is_not_decoded_to_its_end(
    tagger, tmp_path, rate, monkeypatch
):
    # FLAC's count of samples, the 36 bits that end 26 bytes into the file, may be 0 for "unknown".
    content = bytearray(sound(seconds=40 if rate > 1 else 4000, rate=rate, form="flac"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path = tmp_path / "a.flac"
    path.write_bytes(content)
    with soundfile.SoundFile(path) as file:
        assert file.frames > 2**62
    given = []
    stream = analysis.stream_audio

    def watched(*arguments, **keywords):
        for samples in stream(*arguments, **keywords):
            given.append(len(samples))
            yield samples

    monkeypatch.setattr(analysis, "stream_audio", watched)
    with pytest.raises(analysis.UserError, match="longer than the 2 s"):
        analysis.analyse(tagger, path, "a", max_seconds=2)
    # At 1 Hz the resampler's filter alone is some minutes long.
    assert sum(given) <= (31 if rate > 1 else 1000) * 22050


def test_an_upload_that_is_too_large_stops_before_it_fills_the_disk(tagger, live):
    application = create_app(tagger, limits=Limits(max_bytes=200_000))
    with live(application) as port:
        folder = application.state.folder
        for length, parts in (
            (("Content-Length", "100000000"), 0),
            (("Transfer-Encoding", "chunked"), 5),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.putrequest("POST", "/api/tag")
            connection.putheader(NAME_HEADER, "song.wav")
            connection.putheader(*length)
            connection.endheaders()
            largest = 0
            for _ in range(parts):
                connection.send(b"%x\r\n%s\r\n" % (50_000, bytes(50_000)))
                time.sleep(0.02)
                largest = max([largest, *(path.stat().st_size for path in folder.iterdir())])
            # The answer comes though the upload would go on.
            answer = connection.getresponse()
            assert answer.status == 413
            assert b"song.wav: larger than the 0.2 MB that this server accepts" in answer.read()
            assert largest <= 200_000
            assert (largest > 0) == (parts > 0)
            assert not list(folder.iterdir())
            connection.close()
        # Who sends all before reading learns why, and can go on with another file.
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        for content, status in ((bytes(5_000_000), 413), (sound(seconds=2.0), 200)):
            connection.request("POST", "/api/tag", content, {NAME_HEADER: "song.wav"})
            answer = connection.getresponse()
            assert answer.status == status and answer.read()
        connection.close()


def test_a_full_disk_is_said(tagger, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with client_of(tagger) as client:
        monkeypatch.setattr(app, "open", lambda *arguments: Full(), raising=False)
        answer = post(client, sound())
        assert answer.status_code == 507
        assert "song.wav: this server cannot store it (No space left" in answer.json()["error"]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("C:\\music\\a.mp3", "a.mp3"),
        ("%00%0Aa%1B%5B31m%E2%80%AEb.mp3", "a[31mb.mp3"),
        ("%3Cimg%20src=x%3E.mp3", "<img src=x>.mp3"),
        ("%FF.mp3", "\N{REPLACEMENT CHARACTER}.mp3"),
        ("x" * 1000, "x" * 200),
    ],
)
def test_a_name_is_only_shown(tagger, header, name):
    with client_of(tagger) as client:
        assert post(client, sound(seconds=1.5), header).json()["file"] == name


def test_a_name_is_needed_so_that_no_other_site_can_send_files(tagger):
    with client_of(tagger) as client:
        for headers in ({}, {NAME_HEADER: "folder/"}):
            answer = client.post("/api/tag", content=sound(), headers=headers)
            assert answer.status_code == 400
            assert NAME_HEADER in answer.json()["error"]
            assert uploads(client) == []
        asked = {
            "Origin": "https://elsewhere.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-file-name",
        }
        permission = client.options("/api/tag", headers=asked)
        assert permission.status_code == 405
        assert not [name for name in permission.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),
        ("music.local:80", 200),
        ("evil.example", 400),
        ("localhost.evil.example:8000", 400),
        ("127.0.0.1.evil.example", 400),
        ("[evil.example]", 400),
        ("", 400),
    ],
)
def test_only_its_own_names_reach_it(tagger, host, status):
    with client_of(tagger, hosts=["Music.local"]) as client:
        for path in ("/", "/api/model"):
            assert client.get(path, headers={"Host": host}).status_code == status


def test_every_answer_tells_the_browser_to_load_nothing_from_elsewhere(tagger):
    with client_of(tagger) as client:
        paths = ("/", "/page.js", "/style.css", "/api/model", "/gone")
        answers = [client.get(path) for path in paths]
        answers += [client.get("/", headers={"Host": "evil.example"}), post(client, b"")]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 404, 400, 422]
        for answer in answers:
            policy = answer.headers["content-security-policy"].split("; ")
            assert "default-src 'none'" in policy
            assert "script-src 'self'" in policy
            assert "unsafe" not in str(policy)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["cache-control"] == "no-store"
        # Nor does the page name another host.
        text = "".join(answer.text for answer in answers[:3])
        text = text.replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text.replace("// ", "") and "innerHTML" not in text
        for path in ("/docs", "/redoc", "/openapi.json", "/..%2Fapp.py", "/%2e%2e/app.py"):
            assert client.get(path).status_code == 404


def test_the_model_says_what_it_is(tagger):
    with client_of(tagger, limits=Limits(max_bytes=5_000_000, max_seconds=90)) as client:
        about = client.get("/api/model").json()
    assert about["labels"] == list(tagger.labels)
    assert about["network"] == "conv1d"
    assert about["synthetic"] is False
    assert about["measure"] == {"name": "accuracy", "value": 0.5, "split": "validation"}
    assert about["window_seconds"] == 64 * 512 / 22050 and about["neighbours"] is False
    assert (about["max_bytes"], about["max_seconds"]) == (5_000_000, 90)
    # A run has no card.
    assert "- Labels in the order of the outputs: low, middle, high/est" in about["card"]
    assert "private" not in about["card"]
    made = dataclasses.replace(tagger.model, dataset={**tagger.model.dataset, "synthetic": True})
    with client_of(Tagger(made), Index()) as client:
        about = client.get("/api/model").json()
        assert about["synthetic"] is True and about["neighbours"] is True


def test_the_folder_of_uploads_is_private_and_goes_with_the_server(tagger):
    with client_of(tagger) as client:
        folder = client.app.state.folder
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_one_at_a_time_and_too_many_are_sent_away(tagger, monkeypatch):
    release, lock, working, most = threading.Event(), threading.Lock(), [0], [0]

    def slow(*arguments, **keywords):
        with lock:
            working[0] += 1
            most[0] = max(most[0], working[0])
        assert release.wait(10)
        with lock:
            working[0] -= 1
        return {"file": arguments[2]}

    monkeypatch.setattr(app, "analyse", slow)
    answers = {}
    with client_of(tagger, limits=Limits(max_waiting=2)) as client:

        def send(name):
            answers[name] = post(client, b"some bytes", name)

        threads = [threading.Thread(target=send, args=(name,), daemon=True) for name in "abc"]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(uploads(client)) == 3 and working[0] >= 1)
            refused = post(client, b"some bytes", "d")
            # The page itself answers all the while.
            assert client.get("/api/model").status_code == 200
        finally:
            release.set()
        assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
        assert refused.json()["error"].startswith("d: too many files are waiting")
        for thread in threads:
            thread.join(10)
        assert uploads(client) == [] and post(client, b"some bytes", "e").status_code == 200
    found = {name: answer.json() for name, answer in answers.items()}
    assert found == {name: {"file": name} for name in "abc"}
    assert most[0] == 1


def test_what_fails_unforeseen_leaves_no_file_and_lets_the_next_in(tagger, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("a mistake of ours")

    with TestClient(
        create_app(tagger), base_url="http://localhost", raise_server_exceptions=False
    ) as client:
        with monkeypatch.context() as patch:
            patch.setattr(app, "analyse", broken)
            for _ in range(12):  # more than may wait
                answer = post(client, b"some bytes")
                assert answer.status_code == 500
                assert "mistake" not in answer.text
                assert uploads(client) == []
        assert post(client, sound(seconds=1.5)).status_code == 200


def start_upload(port, length, body):
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = (
        f"POST /api/tag HTTP/1.1\r\nHost: localhost\r\n{NAME_HEADER}: song.wav\r\n"
        f"Content-Length: {length}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def test_who_leaves_while_sending_or_waiting_leaves_nothing(tagger, live, monkeypatch):
    started, left = threading.Semaphore(0), []

    def patient(*arguments, wanted, **keywords):
        started.release()
        until(lambda: not wanted())
        left.append(arguments[2])
        raise app.Abandoned

    monkeypatch.setattr(app, "analyse", patient)
    application = create_app(tagger)
    with live(application) as port:
        folder = application.state.folder
        sending = start_upload(port, 1000, b"half")
        until(lambda: list(folder.iterdir()))
        sending.close()
        until(lambda: not list(folder.iterdir()))
        assert left == []
        worked_on = start_upload(port, 4, b"full")
        assert started.acquire(timeout=5)
        in_the_queue = start_upload(port, 4, b"full")
        until(lambda: len(list(folder.iterdir())) == 2)
        in_the_queue.close()
        until(lambda: len(list(folder.iterdir())) == 1)
        assert left == []
        worked_on.close()
        until(lambda: not list(folder.iterdir()))
        assert left == ["song.wav"]
    assert not folder.exists()


def test_an_upload_that_never_ends_is_given_up(tagger, live):
    application = create_app(tagger, limits=Limits(upload_seconds=0.2))
    with live(application) as port:
        with start_upload(port, 1000, b"half") as connection:
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 408
            assert b"song.wav: did not arrive within 0.2 seconds" in answer.read()
        assert not list(application.state.folder.iterdir())
