"""Weights that others have published, by name, and their download into the user's cache folder."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import progress_bar, remove_abandoned, whole_file
from mrcnn_jax.runs import hub

BASE = "https://download.pytorch.org/models/"
LICENCE = "no licence of the weights is stated (that of torchvision's code is BSD-3-Clause)"
_CHUNK_BYTES, _SECONDS = 1 << 20, 30.0


@dataclass(frozen=True)
class Published:
    """A file that torchvision has published."""

    file: str
    """Its name ends in the first eight hex digits of its SHA-256, by which torch.hub checks it."""
    mebibytes: float
    """Its size, as torchvision states it."""

    @property
    def digits(self) -> str:
        """The beginning of its SHA-256."""
        return Path(self.file).stem.rpartition("-")[2]

    def __str__(self) -> str:
        return f"{BASE}{self.file}, {self.mebibytes:.0f} MiB, SHA-256 {self.digits}..., {LICENCE}"


PUBLISHED = {
    "torchvision-coco-v1": Published("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", 169.8),
    "torchvision-coco-v2": Published("maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth", 177.2),
    "torchvision-resnet18": Published("resnet18-f37072fd.pth", 44.7),
    "torchvision-resnet34": Published("resnet34-b627a593.pth", 83.3),
    "torchvision-resnet50": Published("resnet50-0676ba61.pth", 97.8),
    "torchvision-resnet50-v2": Published("resnet50-11ad3fa6.pth", 97.8),
    "torchvision-resnet101": Published("resnet101-63fe2227.pth", 170.5),
    "torchvision-convnext-tiny": Published("convnext_tiny-983f1562.pth", 109.1),
    "torchvision-convnext-small": Published("convnext_small-0c510722.pth", 191.7),
}


def locate(weights: str, *, download: bool, option: str = "--weights: ") -> Path:
    """Finds the weights that the option --weights names; fetches them only if `download` says so.

    Args:
        weights: a file or folder, looked up in the working directory and then in $MRCNN_DATA; one
            of the names in `PUBLISHED`; or a model of the Hugging Face Hub, hf://org/name.
        download: fetch the published file unless it was fetched before.
        option: begins errors about the name.

    Returns:
        An absolute path.

    Raises:
        ConfigError: there is nothing of that name, or it is published and was not fetched.
        cli.Failure: the download failed.
    """
    if weights.startswith(hub.SCHEME):
        return hub.fetch(weights, download=download).resolve()
    for folder in ("", os.environ.get("MRCNN_DATA", "")):
        path = Path(folder, weights)
        if path.exists():
            if download:
                raise ConfigError(f"--download: {weights} is a path, and nothing to fetch")
            return path.resolve()
    if weights not in PUBLISHED:
        raise ConfigError(
            f"{option}{weights}: no such file or run, and none of the published ones: "
            f"{', '.join(PUBLISHED)}"
        )
    path = _cached(weights)
    if path.exists():
        return path
    if not download:
        raise ConfigError(
            f"{option}{weights}: not fetched yet; with --download it would be, from "
            f"{PUBLISHED[weights]}, to {path}"
        )
    return fetch(weights)


def _cached(name: str) -> Path:
    """Where a published file lies, or would lie, on this machine."""
    return cli.cache_folder().resolve() / "weights" / PUBLISHED[name].file


def fetch(name: str, base: str = BASE) -> Path:
    """Downloads a published file; it gets its name once its SHA-256 begins as published.

    Args:
        name: of `PUBLISHED`.
        base: start of the address.

    Returns:
        The file, in the user's cache folder.

    Raises:
        cli.Failure: it cannot be fetched, or has another SHA-256; nothing is left of it then.
        OSError: it cannot be written; has its name.
    """
    published, path = PUBLISHED[name], _cached(name)
    address = base + published.file
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    digest = hashlib.sha256()
    with whole_file(path) as part, part.open("wb") as file:
        for chunk in _chunks(address):
            file.write(chunk)
            digest.update(chunk)
        if not digest.hexdigest().startswith(published.digits):
            raise cli.Failure(
                f"{address}: its SHA-256 begins with {digest.hexdigest()[:8]}, and not with "
                f"{published.digits}, as published: nothing was kept"
            )
    print(f"{address}: fetched to {path}")
    return path


def _chunks(address: str) -> Iterator[bytes]:
    """The content of an address, with a progress bar; Failure if the connection fails."""
    try:
        with closing(urllib.request.urlopen(address, timeout=_SECONDS)) as response:
            size = int(response.headers.get("Content-Length", 0)) or None
            name = address.rpartition("/")[2]
            with progress_bar(size, name, unit="B", unit_scale=True) as bar:
                while chunk := response.read(_CHUNK_BYTES):
                    bar.update(len(chunk))
                    yield chunk
                if size is not None and bar.n != size:
                    raise http.client.IncompleteRead(b"", size - bar.n)
    except urllib.error.HTTPError as error:
        raise cli.Failure(f"{address}: status {error.code} ({error.reason})") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise cli.Failure(f"{address}: cannot be fetched: {reason}") from None
