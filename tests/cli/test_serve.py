import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi", reason="the extra demo is not installed")
pytest.importorskip("uvicorn", reason="the extra demo is not installed")

import uvicorn

from musicgenre import Tagger
from musicgenre.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return cli.main(["serve", *map(str, arguments)])


def sound(path, seed):
    # A tone on noise: files that a network tells apart.
    samples = 0.05 * np.random.default_rng(seed).standard_normal(60_000)
    soundfile.write(path, samples + 0.3 * np.sin(0.02 * 2**seed * np.arange(60_000)), 22050)
    return path


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--max_mb=0", "--max_mb must be positive"),
        ("--max-seconds=inf", "--max_seconds must be positive"),
        ("--max_waiting=-1", "--max_waiting=-1: -1 is not a non-negative integer"),
        ("--port=70000", "--port=70000: 70000 is not an integer in the range [0, 65535]"),
        ("--host=no.such.host.invalid", "--host=no.such.host.invalid: no such address"),
        ("--model=nowhere", "nowhere: no such workdir"),
        ("--index=nowhere.index", "nowhere.index"),
    ],
)
def test_wrong_options_are_one_line(bundle, capsys, argument, message):
    assert run("--port=0", f"--model={bundle}", argument) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(f"--port={port}") == 2
        assert f"--port={port}: cannot listen there (" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["uvicorn", "fastapi"])
def test_what_is_missing_is_named(monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "musicgenre.web.app", raising=False)
    assert run() == 2
    error = f"error: the page needs {missing}: pip install 'musicgenre[demo]'\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    ("host", "shown", "open_to_all"),
    [
        ("127.0.0.1", "http://127.0.0.1:", False),
        ("localhost", "http://localhost:", False),
        ("0.0.0.0", "http://0.0.0.0:", True),
    ],
)
def test_it_says_where_it_is_and_who_can_reach_it(
    bundle, monkeypatch, capsys, host, shown, open_to_all
):
    served = []

    def started(server, sockets):
        served.append((server.config, sockets[0].getsockname()[1]))

    monkeypatch.setattr(uvicorn.Server, "run", started)
    assert run(f"--host={host}", "--port=0", f"--model={bundle}") == 0
    written = capsys.readouterr()
    ((config, port),) = served
    assert written.out == f"{shown}{port}  (Ctrl-C stops it)\n"
    assert ("everybody who reaches this machine" in written.err) is open_to_all
    # Headers of a proxy are not trusted, and the server reveals no version.
    assert not config.proxy_headers and not config.server_header


def ask(port, path, name):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/api/tag", path.read_bytes(), {"X-File-Name": name})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return found


def test_from_the_shell_to_sigterm(bundle, tmp_path, capsys):
    music = [sound(tmp_path / f"{seed}.wav", seed) for seed in range(3)]
    index = tmp_path / "music.index"
    adding = [f"--add={path}" for path in music]
    assert cli.main(["similar", f"--model={bundle}", f"--index={index}", *adding]) == 0
    capsys.readouterr()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "musicgenre", "serve", "--port=0"]
    command += [f"--model={bundle}", f"--index={index}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"TMPDIR": str(temporary)}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        line = server.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), server.stderr.read()
        port = int(line.split("  ")[0].rpartition(":")[2])
        found = ask(port, music[1], "mine.wav")
        tags = Tagger.load(bundle).tag(music[1])
        assert [(entry["label"], entry["probability"]) for entry in found["labels"]] == tags
        assert found["neighbours"][0]["file"] == f"{tmp_path.name}/1.wav"
        assert len(found["neighbours"]) == 3
        nearest, second, _ = (entry["similarity"] for entry in found["neighbours"])
        assert nearest == pytest.approx(1, abs=1e-5) and second < 0.9999
        # Stopped in the middle of an upload.
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"POST /api/tag HTTP/1.1\r\nHost: localhost\r\nX-File-Name: a\r\n"
                b"Content-Length: 9\r\n\r\nhalf"
            )
            while not list(temporary.glob("musicgenre-uploads-*/*")):
                time.sleep(0.01)
            server.send_signal(signal.SIGTERM)
            assert server.wait(5) == 128 + signal.SIGTERM
        assert list(temporary.iterdir()) == []
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.communicate()
