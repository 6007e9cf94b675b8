"""support/download.py gets whole files, whatever the network does.

A hub on this machine answers as a script says.
"""
import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import os
import re
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

import pytest
import urllib3

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from support import download


pytestmark = pytest.mark.usefixtures("empty_folder")


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request.

    The server has `files` {name: bytes}, a `script`, and a `log` of (first byte asked for,
    Authorization header). Each request takes the first entry from the script; without one, the
    hub answers as it should. An entry is one of

        (status, headers)       this status, without a body
        ("breaks", n)           the connection ends after n bytes
        ("deaf",)               the server knows no Range, and sends all of the file
        ("elsewhere",)          other bytes than asked for
        ("longer",)             1000 bytes more than were published
        ("endless",)            the length is not announced, and 1000 bytes too many come
        ("portal",)             the login page of a network, without its length
    """

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.server
        body = hub.files[self.path.split("/")[-1]]
        if "gzip" in self.headers["Accept-Encoding"]:
            body = gzip.compress(body)  # as some mirrors do
        how, *more = hub.script.pop(0) if hub.script else ("well",)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        hub.log.append((start, self.headers.get("Authorization")))
        rest = body[start:]
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}",
                   "Content-Length": len(rest)}
        status = 206 if start else 200
        if isinstance(how, int):
            status = how
            rest = b""
            headers = {"Content-Length": 0}
            headers.update(*more)
        elif how == "deaf":
            status = 200
            rest = body
            headers = {"Content-Length": len(body)}
        elif how == "endless":
            rest += b"x" * 1000
            headers = {}  # HTTP/1.0: the body ends where the connection does
        elif how == "portal":
            status = 200
            rest = b"<html>log in</html>"
            headers = {}
        elif start >= len(body):
            status = 416
            rest = b""
            headers = {"Content-Length": 0}
        elif how == "breaks":
            rest = rest[:more[0]]
        elif how == "elsewhere":
            headers["Content-Range"] = f"bytes {start + 1}-{len(body) - 1}/{len(body)}"
        elif how == "longer":
            rest += b"x" * 1000
            headers["Content-Length"] += 1000
        self.answer(status, headers, rest)

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):  # the reader has seen enough
            self.wfile.write(body)


def serve(files):
    """Start a hub on a free port. files: {name: bytes}."""
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.files = files
    hub.script = []
    hub.log = []
    hub.url = f"http://127.0.0.1:{hub.server_port}"
    loop = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    loop.start()
    return hub


def stop(hub):
    hub.shutdown()
    hub.server_close()


def starts(hub):
    """The first byte of each request."""
    return [start for start, _ in hub.log]


@pytest.fixture
def hub(monkeypatch):
    """A hub with a small TinyStories. Nobody really sleeps: hub.waits lists the seconds."""
    bodies = {}
    for name, kind in zip(download.SOURCES["tinystories"], ["train", "valid"]):
        stories = [f"{kind} {i}" for i in range(3000)]
        bodies[name] = "<|endoftext|>".join(stories).encode()
    hub = serve(bodies)
    for name, body in bodies.items():
        published = download.TINY, len(body), hashlib.sha256(body).hexdigest()
        monkeypatch.setitem(download.HUB, name, published)
    hub.target = Path("data/downloads/TinyStoriesV2-GPT4-valid.txt")
    hub.part = Path(f"{hub.target}.part")
    hub.valid = bodies[hub.target.name]
    hub.waits = []
    monkeypatch.setattr(time, "sleep", hub.waits.append)
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    yield hub
    stop(hub)


def refusal(hub):
    """Ask for the file, which must fail with a ValueError of one line. Returns that line."""
    with pytest.raises(ValueError) as error:
        download.get(hub.target)
    said = str(error.value)
    assert "\n" not in said
    assert not hub.target.exists()
    return said


def check_says_what_to_do(said, hub):
    assert f"{hub.url}/{download.TINY}{hub.target.name}" in said
    assert "run the same command again" in said
    assert f"place it at {hub.target} " in said
    assert "--from-file" in said


# ---- on the command line

STORY = "tinystories --tokenizer bytes --small"


def test_download_and_use_again(hub):
    import prepare_data
    assert prepare_data.main("tinystories --tokenizer bytes".split()) == 0
    assert prepare_data.main(f"{STORY} --out small".split()) == 0
    assert Path("small/meta.json").exists()
    assert len(hub.log) == 2  # the second command downloaded nothing


def test_a_refusal_is_one_line(hub):
    import prepare_data
    hub.script = [(404,)]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert prepare_data.main(STORY.split()) == 1
    assert re.fullmatch("prepare_data.py: .+\n", stderr.getvalue())
    assert not Path("data/tinystories/meta.json").exists()


# ---- breaks

@pytest.mark.parametrize("script, expected_starts", [
    # goes on where it broke off, again and again
    ([("breaks", 1000)] * 9, range(0, 10_000, 1000)),
    # starts over
    ([("breaks", 1000), ("deaf",)], [0, 1000]),
    # does not take other bytes than it asked for
    ([("breaks", 1000), ("elsewhere",)], [0, 1000, 0]),
    # does not take a page without a length for the beginning of the file
    ([("portal",)], [0, 0]),
    # asks again while the server is busy
    ([(429, {"Retry-After": "7"}), (503,), (408,), (520,)], [0] * 5),
])
def test_download_goes_on(script, expected_starts, hub):
    hub.script = script
    assert download.get(hub.target) == hub.target
    assert hub.target.read_bytes() == hub.valid
    assert not hub.part.exists()
    assert starts(hub) == list(expected_starts)
    assert sum(hub.waits) < 60


@pytest.mark.parametrize("size, expected_starts", [
    (9000, [9000]),  # some of it
    (67877, []),  # all of it: nothing is asked
    (99999, [99999, 0]),  # more than there is: it was another file
])
def test_a_part_from_a_process_that_was_killed(size, expected_starts, hub):
    hub.part.parent.mkdir(parents=True)
    hub.part.write_bytes((hub.valid * 2)[:size])
    download.get(hub.target)
    assert hub.target.read_bytes() == hub.valid
    assert not hub.part.exists()
    assert starts(hub) == expected_starts


def test_the_server_may_not_ask_for_an_hour(hub):
    hub.script = [(429, {"Retry-After": "3600"})]
    download.get(hub.target)
    assert max(hub.waits) == download.LONGEST_WAIT


@pytest.mark.parametrize("script, said", [
    ([(503,)] * 99, "503"),
    ([(429, {"Retry-After": "soon"})], "Retry-After"),
    ([("breaks", 0)] * 99, "after 0 of 67877 bytes"),
])
def test_download_gives_up(script, said, hub):
    hub.script = script
    line = refusal(hub)
    check_says_what_to_do(line, hub)
    assert said in line
    assert len(hub.log) <= download.TRIES
    assert sum(hub.waits) < 60


def test_download_gives_up_when_nothing_more_comes(hub):
    hub.script = [("breaks", 1000)] + [("breaks", 0)] * 99
    check_says_what_to_do(refusal(hub), hub)
    assert starts(hub) == [0] + [1000] * (download.TRIES - 1)
    assert hub.part.stat().st_size == 1000  # what came stays, for the next run


@pytest.mark.parametrize("status, hint", [(404, ""), (401, "HF_TOKEN"), (403, "HF_TOKEN")])
def test_what_is_not_there_is_asked_for_once(status, hint, hub):
    hub.script = [(status,)]
    said = refusal(hub)
    check_says_what_to_do(said, hub)
    assert str(status) in said
    assert hint in said
    assert len(hub.log) == 1


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
                                    errno.ETIMEDOUT, errno.ECONNRESET])
@pytest.mark.parametrize("place", [1, 3])
def test_the_network_goes_down_while_we_read(number, place, hub, monkeypatch):
    """Before the answer has come, and in the middle of it."""
    real = socket.SocketIO.readinto
    reads = 0

    def readinto(file, buffer):
        nonlocal reads
        if threading.current_thread() is threading.main_thread():  # not the hub's
            reads += 1
            if reads == place:
                raise OSError(number, os.strerror(number))
        return real(file, buffer)
    monkeypatch.setattr(socket.SocketIO, "readinto", readinto)
    download.get(hub.target)
    assert hub.target.read_bytes() == hub.valid
    assert reads > place  # it did go down


def test_no_connection(hub):
    stop(hub)
    said = refusal(hub)
    check_says_what_to_do(said, hub)
    assert "refused" in said


def test_a_certificate_that_is_not_trusted_is_said_at_once(hub, monkeypatch):
    def connect(connection):
        raise ssl.SSLCertVerificationError(
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self signed")
    monkeypatch.setattr(urllib3.connection.HTTPConnection, "connect", connect)
    said = refusal(hub)
    check_says_what_to_do(said, hub)
    assert "REQUESTS_CA_BUNDLE" in said
    assert not any(hub.waits)


# ---- which file it is

def test_download_of_another_size(hub):
    hub.script = [("longer",)]
    said = refusal(hub)
    assert f"{len(hub.valid) + 1000} bytes long, {len(hub.valid)} were expected" in said
    assert "--no-verify" in said
    hub.script = [("longer",)]
    download.get(hub.target, no_verify=True)
    assert hub.target.read_bytes() == hub.valid + b"x" * 1000


def test_download_of_something_else(hub):
    wrong = hub.valid.replace(b"v", b"V")
    hub.files[hub.target.name] = wrong
    # The bytes stay, for --no-verify, and they are not trusted the second time.
    for _ in range(2):
        said = refusal(hub)
        assert hashlib.sha256(wrong).hexdigest() in said
        assert f"{hub.part} (67877 bytes)" in said
        assert "--no-verify" in said
    download.get(hub.target, no_verify=True)
    assert hub.target.read_bytes() == wrong
    assert starts(hub) == [0]
    with pytest.raises(ValueError, match="sha256"):  # a file that is there is checked, too
        download.get(hub.target)
    assert hub.target.read_bytes() == wrong


def test_download_of_more_than_was_published(hub):
    hub.script = [("endless",)]
    assert "sha256" in refusal(hub)
    download.get(hub.target)  # the part is longer than the file, so it starts over
    assert hub.target.read_bytes() == hub.valid
    assert starts(hub) == [0, len(hub.valid) + 1000, 0]


def test_a_finished_file_needs_neither_hub_nor_writing(hub, monkeypatch):
    hub.target.parent.mkdir(parents=True)
    hub.target.write_bytes(hub.valid)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(download, "locked", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert download.get(hub.target) == hub.target
    assert hub.target.read_bytes() == hub.valid
    assert hub.log == []


def test_files_of_other_names(hub):
    """A user's own file is taken as it is. If it is not there, nobody is asked for it."""
    Path("mine.txt").write_text("one")
    assert download.get(Path("mine.txt")) == Path("mine.txt")
    with pytest.raises(ValueError, match="yours.txt does not exist"):
        download.get(Path("yours.txt"))
    assert hub.log == []


def test_two_processes_download_once(hub):
    others = [threading.Thread(target=download.get, args=[hub.target]) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert hub.target.read_bytes() == hub.valid
    assert starts(hub) == [0]


# ---- whom we ask

@pytest.mark.parametrize("token", ["secret\n", ""])
def test_the_token_stays_with_the_hub(token, hub, monkeypatch):
    """HF_TOKEN goes to the hub, not to the host of a redirect. Passwords of ~/.netrc go nowhere."""
    other = serve(hub.files)
    redirect = (302, {"Location": f"{other.url}/{hub.target.name}"})
    hub.script = [redirect, redirect]
    other.script = [("breaks", 100)]
    monkeypatch.setenv("HF_TOKEN", token)
    Path("netrc").write_text("machine 127.0.0.1 login ada password lovelace\n"
                             "default login ada password lovelace\n")
    monkeypatch.setenv("NETRC", "netrc")
    download.get(hub.target)
    stop(other)
    expected = "Bearer secret" if token else None
    assert hub.log == [(0, expected), (100, expected)]
    assert other.log == [(0, None), (100, None)]
    assert hub.target.read_bytes() == hub.valid


@pytest.mark.parametrize("token", ["two\nlines", "clé"])
def test_a_token_with_characters_that_no_token_has(token, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    said = refusal(hub)
    assert "HF_TOKEN has characters" in said
    assert token not in said
    assert hub.log == []


def test_the_proxy_is_used(hub, monkeypatch):
    """A proxy gets the whole address; ours takes the last part of it and answers itself."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", hub.url)
    download.get(hub.target)
    assert hub.target.read_bytes() == hub.valid


@pytest.mark.parametrize("endpoint, url", [
    ("", "https://huggingface.co/datasets/a"),
    ("mirror.example/hf/", "https://mirror.example/hf/datasets/a"),
    ("http://mirror.example", "http://mirror.example/datasets/a"),
])
def test_another_mirror(endpoint, url, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "fetch", lambda session, url, part, size: asked.append(url))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    download.download("datasets/a", Path("a.part"), None)
    assert asked == [url]


@pytest.mark.parametrize("endpoint", ["http://", "http://[", "ftp://mirror.example"])
def test_an_endpoint_that_is_no_address(endpoint, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "--from-file" in refusal(hub)
