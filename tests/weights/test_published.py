"""Published weights are fetched when that is asked for, and kept only if they are what was
published."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.weights import published
from mrcnn_jax.weights.published import PUBLISHED, fetch, locate

NAME = "torchvision-resnet18"
CONTENT = bytes(range(256)) * 9000  # more than two chunks


@dataclass
class Site:
    """A web server of this machine, which answers each request by `status` and `sent` bytes of the
    content."""

    base: str = ""
    status: int = 200
    sent: int = len(CONTENT)
    requests: int = 0


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """With the digits of its own content, and an empty cache folder."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.requests += 1
            self.send_response(site.status)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: site.sent])

        def log_message(self, *_: object) -> None:
            pass

    digits = hashlib.sha256(CONTENT).hexdigest()[:8]
    monkeypatch.setitem(PUBLISHED, NAME, replace(PUBLISHED[NAME], file=f"resnet18-{digits}.pth"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MRCNN_DATA", raising=False)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        site.base = f"http://127.0.0.1:{server.server_port}/models/"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield site
        server.shutdown()
        thread.join()


def left_in(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_was_fetched_is_found(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch(NAME, site.base)
    folder = tmp_path / "cache" / "mrcnn_jax" / "weights"
    assert path == folder / PUBLISHED[NAME].file
    assert path.read_bytes() == CONTENT
    assert left_in(tmp_path) == [path]
    streams = capsys.readouterr()
    assert streams.out == f"{site.base}{path.name}: fetched to {path}\n"
    assert path.name in streams.err  # the progress bar
    for download in (False, True):
        assert locate(NAME, download=download) == path
    assert site.requests == 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"status": 404}, "status 404 (Not Found)"),
        ({"sent": 2_000_000}, "cannot be fetched: IncompleteRead(0 bytes read, 304000 more exp"),
        ({"sent": 0}, "cannot be fetched: IncompleteRead(0 bytes read, 2304000 more expected)"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    change: dict[str, int], line: str, site: Site, tmp_path: Path
) -> None:
    for name, value in change.items():
        setattr(site, name, value)
    with pytest.raises(cli.Failure) as error:
        fetch(NAME, site.base)
    assert str(error.value).startswith(f"{site.base}{PUBLISHED[NAME].file}: {line}")
    assert left_in(tmp_path) == []


def test_other_bytes_leave_nothing(site: Site, tmp_path: Path) -> None:
    other = replace(PUBLISHED[NAME], file="resnet18-f37072fd.pth")
    PUBLISHED[NAME] = other  # until the fixture puts the table's own row back
    with pytest.raises(cli.Failure, match=r"SHA-256 begins with \w{8}, and not with f37072fd, as"):
        fetch(NAME, site.base)
    assert left_in(tmp_path) == []


def test_a_server_that_is_not_there(site: Site, tmp_path: Path) -> None:
    with pytest.raises(cli.Failure, match=r"^http://127\.0\.0\.1:1/.*: cannot be fetched: .*refus"):
        fetch(NAME, "http://127.0.0.1:1/")
    assert left_in(tmp_path) == []


def test_nothing_is_fetched_unasked(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        locate(NAME, download=False)
    row = PUBLISHED[NAME]
    assert str(error.value) == (
        f"--weights: {NAME}: not fetched yet; with --download it would be, from "
        f"{published.BASE}{row.file}, 45 MiB, SHA-256 {row.digits}..., {published.LICENCE}, to "
        f"{tmp_path}/cache/mrcnn_jax/weights/{row.file}"
    )
    assert site.requests == 0
    with pytest.raises(ConfigError, match=r"^--weights: resnet: no such file .*: torchvision-coco"):
        locate("resnet", download=True)
    (tmp_path / NAME).mkdir()
    with pytest.raises(ConfigError, match=r"^--download: .* is a path, and nothing to fetch$"):
        locate(str(tmp_path / NAME), download=True)


@pytest.mark.parametrize("option", ["--weights: ", ""])
def test_the_option_that_names_weights_is_said(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`import` has none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, why in ((NAME, "not fetched yet"), ("resnet", "no such file")):
        with pytest.raises(ConfigError, match=f"^{option}{name}: {why}"):
            locate(name, download=False, option=option)


def test_a_folder_to_keep_them_in_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the home is not known."""

    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match=r"^XDG_CACHE_HOME: name a folder .* kept: no home$"):
        locate(NAME, download=True)


def test_paths_come_first(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in the working directory, then those in $MRCNN_DATA, as init_from's."""
    (tmp_path / "data" / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MRCNN_DATA", str(tmp_path / "data"))
    assert locate(NAME, download=False) == tmp_path / "data" / NAME
    (tmp_path / NAME).mkdir()
    assert locate(NAME, download=False) == tmp_path / NAME


def test_names_end_in_the_digits() -> None:
    assert {row.digits for row in PUBLISHED.values()} == {
        *("bf2d0c1e", "73cbd019", "f37072fd", "b627a593", "0676ba61", "11ad3fa6", "63fe2227"),
        *("983f1562", "0c510722"),
    }


def test_a_model_of_the_hub_is_fetched_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(address: str, *, download: bool) -> Path:
        asked.append((address, download))
        return tmp_path

    monkeypatch.setattr(published.hub, "fetch", fetch)
    for download in (False, True):
        assert locate("hf://org/name@v1", download=download) == tmp_path
    assert asked == [("hf://org/name@v1", False), ("hf://org/name@v1", True)]
