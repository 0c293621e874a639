"""Addresses on the Hub: fetched and uploaded, or one line.

Two stand-ins: the functions of huggingface_hub that are called, which is all that is needed for
errors; and, where the package itself is installed, a Hub on this machine that speaks as much HTTP
as a download and an upload take.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from write_run_fixture import FOLDER

import mrcnn_jax
from mrcnn_jax import cli
from mrcnn_jax.commands import share
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs import hub
from mrcnn_jax.runs.hub_folder import FILES

COMMIT = "0f" * 20
TOKEN = "hf_AbCdEf0123456789"


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://org/name", ("org/name", None)),
        ("hf://my-org/a.b_c@v1.0", ("my-org/a.b_c", "v1.0")),
        (f"hf://org/name@{COMMIT}", ("org/name", COMMIT)),
        ("hf://org/name@refs/pr/1", ("org/name", "refs/pr/1")),
    ],
)
def test_addresses(address: str, parts: tuple[str, str | None]) -> None:
    assert hub.parse(address) == parts


@pytest.mark.parametrize(
    "address",
    ["hf://name", "hf://", "hf://a/b/c", "hf://a/b@", "hf://a/b c", "hf:/a/b", "hf://a/b\n"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(
        ConfigError, match=r"an address on the Hub is hf://org/name or hf://org/nam"
    ):
        hub.parse(address)


def test_without_huggingface_hub_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = r"^hf://a/b: huggingface_hub is not installed \(pip install 'huggingface_hub>=1'\)$"
    for call in (lambda: hub.fetch("hf://a/b"), lambda: hub.upload("hf://a/b", Path())):
        with pytest.raises(ConfigError, match=line):
            call()


# -- the package's functions stood in for ----------------------------------------------------------


class Package(ModuleType):
    """Stands in for huggingface_hub; every call raises `error`, if there is one."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.error, self.calls = folder, None, []
        names = ("RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError")
        self.errors = SimpleNamespace(**{name: type(name, (Exception,), {}) for name in names})

    def _called(self, name: str, options: dict[str, Any]) -> None:
        self.calls.append((name, options))
        if self.error is not None:
            raise self.error

    def snapshot_download(self, repository: str, **options: Any) -> str:
        self._called(repository, options)
        return str(self.folder)

    def HfApi(self, **_: Any) -> Any:  # noqa: N802
        return SimpleNamespace(
            create_repo=lambda repository, **options: self._called(repository, options),
            upload_folder=lambda **options: (
                self._called("upload", options),
                SimpleNamespace(oid=COMMIT),
            )[1],
        )


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    package = Package(tmp_path)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", package.errors)
    return package


def test_what_is_asked_of_the_package(package: Package, tmp_path: Path) -> None:
    assert hub.fetch("hf://org/name@v1") == tmp_path
    assert hub.fetch("hf://org/name", download=False) == tmp_path
    assert hub.upload("hf://org/name", tmp_path) == f"hf://org/name@{COMMIT}"
    (_, first), (_, second), (repository, made), (_, sent) = package.calls
    assert [(call["revision"], call["local_files_only"]) for call in (first, second)] == [
        ("v1", False),
        (None, True),
    ]
    assert sorted(first["allow_patterns"]) == sorted(sent["allow_patterns"]) == sorted(FILES)
    assert (repository, made) == ("org/name", {"private": True, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("org/name", tmp_path)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("RepositoryNotFoundError", "no such model on the Hub, or a private one"),
        ("RevisionNotFoundError", "the model has no such revision"),
        ("HFValidationError", "not a name that the Hub allows"),
    ],
)
def test_a_users_mistake_is_one_line(name: str, line: str, package: Package) -> None:
    package.error = getattr(package.errors, name)(f"Bearer {TOKEN}\nand more")
    for call in (lambda: hub.fetch("hf://a/b"), lambda: hub.upload("hf://a/b", Path())):
        with pytest.raises(ConfigError, match=rf"^hf://a/b: {line}") as error:
            call()
        assert TOKEN not in str(error.value)


@pytest.mark.parametrize("text", [f"sent {TOKEN}\n", f"Authorization: Bearer {TOKEN[3:]}", TOKEN])
def test_no_token_is_told(text: str, package: Package) -> None:
    package.error = OSError(f"no route to host: {text}")
    for call in (lambda: hub.fetch("hf://a/b"), lambda: hub.upload("hf://a/b", Path())):
        with pytest.raises(
            cli.Failure, match=r"^hf://a/b: cannot be .*no route to host: "
        ) as error:
            call()
        assert TOKEN[3:] not in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_not_in_the_cache_is_not_fetched_unasked(package: Package) -> None:
    package.error = FileNotFoundError("Cannot find an appropriate cached snapshot folder")
    with pytest.raises(ConfigError, match=r"^hf://a/b: not fetched yet; with --download it would"):
        hub.fetch("hf://a/b", download=False)


def test_a_model_of_another_library_is_named(package: Package, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"hf://a/b: has no model\.safetensors: not a model of mr"
    ):
        hub.fetch("hf://a/b")
    with pytest.raises(ConfigError, match=r"hf://a/b: not fetched in full; with --download it wo"):
        hub.fetch("hf://a/b", download=False)


def test_nothing_is_uploaded_to_a_revision(package: Package) -> None:
    with pytest.raises(ConfigError, match="leave @ out"):
        hub.upload("hf://a/b@main", Path())
    assert package.calls == []


# -- the package itself, and a Hub on this machine -------------------------------------------------


class Hub:
    """Repositories by name: commits by id, each with its files. The newest one is main."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()
        self.broken = False

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        if self.broken:
            return 500, {}, f"the server has seen {TOKEN}".encode()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, *_json({"url": f"https://huggingface.co/{name}"})[1:]
            self.repositories[name] = {}
            # "private" in huggingface_hub 1, "visibility" in 2.
            self.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return _json({"url": f"https://huggingface.co/{name}"})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            return self._of_model("/".join(words[2:4]), words[4:], body)
        if len(words) == 5 and words[2] == "resolve":
            return self._of_file("/".join(words[:2]), *words[3:])
        return 404, {}, b"{}"

    def _of_model(self, name: str, words: list[str], body: bytes) -> Any:
        commits = self.repositories.get(name)
        if commits is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if words[:1] == ["preupload"]:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return _json({"files": files})
        if words[:1] == ["commit"]:
            commit = hashlib.sha1(body).hexdigest()
            rows = [json.loads(row) for row in body.splitlines()]
            commits[commit] = {
                row["value"]["path"]: base64.b64decode(row["value"]["content"])
                for row in rows
                if row["key"] == "file"
            }
            return _json(
                {"commitOid": commit, "commitUrl": f"https://huggingface.co/{name}/commit/{commit}"}
            )
        commit = self._commit(name, words[1] if len(words) > 1 else "main")
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = commits[commit]
        if words[:1] == ["tree"]:
            return _json(
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(files[path]),
                        "oid": _etag(files[path]),
                    }
                    for path in files
                ]
            )
        return _json({"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]})

    def _commit(self, name: str, revision: str) -> str | None:
        commits = self.repositories[name]
        return revision if revision in commits else [*commits][-1] if revision == "main" else None

    def _of_file(self, name: str, revision: str, path: str) -> Any:
        commit = self._commit(name, revision)
        content = self.repositories[name][str(commit)][path]
        return 200, {"X-Repo-Commit": str(commit), "ETag": f'"{_etag(content)}"'}, content


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    package = pytest.importorskip("huggingface_hub")
    site = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            site.tokens.add(self.headers.get("Authorization"))
            path = unquote(urlsplit(self.path).path)
            status, headers, content = site.answer(self.command, path, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        base = f"http://127.0.0.1:{server.server_port}"
        # $HF_ENDPOINT and $HF_HUB_CACHE are read when the package is imported.
        constants = importlib.import_module("huggingface_hub.constants")
        template = base + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", base)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(package, "HfApi", lambda **options: _api(package, base, options))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield site
        server.shutdown()
        thread.join()


def _api(package: Any, base: str, options: dict[str, Any]) -> Any:
    return package.hf_api.HfApi(endpoint=base, **options)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n# A card\n")
    (folder / "secret.txt").write_text("not to be uploaded")
    return folder


def test_what_is_uploaded_is_fetched(site: Hub, model: Path) -> None:
    address = hub.upload("hf://org/name", model)
    (first,) = site.repositories["org/name"]
    assert address == f"hf://org/name@{first}"
    assert site.private == {"org/name": True}
    folder = hub.fetch("hf://org/name")
    assert (folder.name, folder.parent.name) == (first, "snapshots")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: (model / name).read_bytes() for name in FILES
    }
    assert f"Bearer {TOKEN}" in site.tokens

    (model / "config.json").write_text('{"a": 1}')  # a second revision; the first one stays
    second = hub.upload("hf://org/name", model)
    assert second != address
    assert (hub.fetch("hf://org/name") / "config.json").read_text() == '{"a": 1}'
    assert (hub.fetch(address) / "config.json").read_text() == "{}"


def test_a_run_that_was_shared_is_the_same_model(site: Hub, capsys: pytest.CaptureFixture) -> None:
    share.run(share.Arguments(workdir=FOLDER, to="hf://org/name"))
    (commit,) = site.repositories["org/name"]
    assert f"hf://org/name@{commit}" in capsys.readouterr().out
    found, kept = mrcnn_jax.load(f"hf://org/name@{commit}"), mrcnn_jax.load(FOLDER)
    assert found.class_names == kept.class_names
    source = found.run.source
    assert source is not None
    assert commit in source.name
    image = np.random.default_rng(0).integers(0, 256, (100, 120, 3)).astype(np.uint8)
    ours, theirs = (model.predict(image) for model in (kept, found))
    assert len(ours.scores) > 0
    np.testing.assert_array_equal(ours.boxes, theirs.boxes)
    np.testing.assert_array_equal(ours.scores, theirs.scores)


def test_what_was_fetched_needs_no_hub(site: Hub, model: Path) -> None:
    address = hub.upload("hf://org/name", model)
    with pytest.raises(ConfigError, match="not fetched yet; with --download"):
        hub.fetch(address, download=False)
    folder = hub.fetch(address)
    hub.fetch("hf://org/name")
    site.broken = True
    assert hub.fetch(address, download=False) == folder
    assert hub.fetch("hf://org/name", download=False) == folder
    assert hub.fetch(address) == folder


def test_mistakes_as_the_hub_answers_them(site: Hub, model: Path) -> None:
    with pytest.raises(ConfigError, match="no such model on the Hub, or a private one"):
        hub.fetch("hf://org/nothing")
    hub.upload("hf://org/name", model)
    with pytest.raises(ConfigError, match="the model has no such revision"):
        hub.fetch("hf://org/name@v9")
    with pytest.raises(ConfigError, match="not a name that the Hub allows"):
        hub.fetch("hf://org/--name")


def test_a_hub_that_fails_is_one_line_without_the_token(site: Hub, model: Path) -> None:
    site.broken = True
    for call in (lambda: hub.fetch("hf://a/b"), lambda: hub.upload("hf://a/b", model)):
        with pytest.raises(cli.Failure, match=r"^hf://a/b: cannot be ") as error:
            call()
        assert "500" in str(error.value)
        assert TOKEN not in str(error.value)
