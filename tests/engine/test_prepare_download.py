"""Downloads from a server of our own that breaks connections off as a test asks."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from vidtta.engine.errors import UserError
from vidtta.engine.prepare import download as module
from vidtta.engine.prepare.download import download, download_ucf101

CONTENT = bytes(range(256)) * 5000


class Server(ThreadingHTTPServer):
    """Serves `content` under any path."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag = CONTENT, '"one"'
        self.breaks: list[int] = []  # bytes after which the coming answers break off
        self.knows_ranges = True
        self.asked: list[tuple[str, str | None]] = []
        self.status = 200

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.asked.append((self.path, wanted))
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        if wanted and server.knows_ranges and self.headers["If-Range"] == server.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            last = len(server.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{last + 1}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        end = start + server.breaks.pop(0) if server.breaks else None
        self.wfile.write(server.content[start:end])

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    with Server() as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield served
        served.shutdown()


def fetch(server, path):
    download(server.url + "a.rar", path, quiet=True, pause=0)


def test_a_file_comes_whole_and_once(server, tmp_path):
    path = tmp_path / "downloads" / "a.rar"
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    fetch(server, path)
    assert server.asked == [("/a.rar", None)]
    assert [found.name for found in path.parent.iterdir()] == ["a.rar"]


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.breaks = [100_000, 1, 300_000]
    fetch(server, tmp_path / "a.rar")
    assert (tmp_path / "a.rar").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-", "bytes=100001-", "bytes=400001-"]


def test_a_later_command_goes_on_too(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRIES", 1)
    server.breaks = [100_000, 0]
    with pytest.raises(UserError) as caught:
        fetch(server, tmp_path / "a.rar")
    assert str(caught.value) == (
        f"{server.url}a.rar could not be fetched (IncompleteRead(0 bytes read, 1180000 more expected)); connect and run "
        f"the same command again, or fetch it in another way and put it at {tmp_path / 'a.rar'}"
    )
    assert (tmp_path / "a.rar.part").read_bytes() == CONTENT[:100_000]
    fetch(server, tmp_path / "a.rar")
    assert (tmp_path / "a.rar").read_bytes() == CONTENT
    assert server.asked[-1] == ("/a.rar", "bytes=100000-")
    assert [found.name for found in tmp_path.iterdir()] == ["a.rar"]


def test_nothing_is_kept_of_another_version(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRIES", 1)
    server.breaks = [100_000, 0]
    with pytest.raises(UserError):
        fetch(server, tmp_path / "a.rar")
    server.content, server.tag = CONTENT[::-1][:-9], '"two"'
    fetch(server, tmp_path / "a.rar")
    assert (tmp_path / "a.rar").read_bytes() == CONTENT[::-1][:-9]


@pytest.mark.parametrize("change", ["no ranges", "weak tag"])
def test_a_server_that_cannot_go_on_is_asked_from_the_start(change, server, tmp_path):
    server.breaks = [100_000]
    server.knows_ranges = change != "no ranges"
    server.tag = 'W/"one"' if change == "weak tag" else server.tag
    fetch(server, tmp_path / "a.rar")
    assert (tmp_path / "a.rar").read_bytes() == CONTENT


def test_a_complete_part_needs_no_connection(server, tmp_path):
    (tmp_path / "a.rar.part").write_bytes(CONTENT)
    (tmp_path / "a.rar.part.json").write_text(f'{{"total": {len(CONTENT)}, "version": null}}')
    fetch(server, tmp_path / "a.rar")
    assert (tmp_path / "a.rar").read_bytes() == CONTENT
    assert server.asked == []


def test_a_file_that_is_not_there_is_asked_for_once(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match=r"could not be fetched \(Not Found\); connect"):
        fetch(server, tmp_path / "a.rar")
    assert len(server.asked) == 1


def test_what_does_not_fit_on_the_disk_is_not_begun(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(UserError) as caught:
        fetch(server, tmp_path / "a.rar")
    assert str(caught.value) == (
        f"{server.url}a.rar: 1,280,000 bytes, but {tmp_path} has room for 1,000,000; make room"
    )


def test_offline_the_address_and_the_place_are_named_at_once(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    monkeypatch.setattr(module, "HOME", address)
    with pytest.raises(UserError) as caught:
        download_ucf101(tmp_path / "downloads", quiet=True)
    zipped = "UCF101TrainTestSplits-RecognitionTask.zip"
    assert str(caught.value) == (
        f"{address}{zipped} could not be fetched ([Errno 111] Connection refused); connect and run the same command "
        f"again, or fetch it in another way and put it at {tmp_path / 'downloads' / zipped}"
    )


def test_the_archive_and_its_lists_come_from_the_official_address(server, tmp_path, monkeypatch):
    assert module.HOME == "https://www.crcv.ucf.edu/data/UCF101/"
    monkeypatch.setattr(module, "HOME", server.url)
    assert download_ucf101(tmp_path, quiet=True) == tmp_path / "UCF101.rar"
    assert [path for path, _ in server.asked] == ["/UCF101TrainTestSplits-RecognitionTask.zip", "/UCF101.rar"]
