"""Models of the Hugging Face Hub: `hf://org/name`, or `hf://org/name@revision`.

Tokens are huggingface_hub's business (`hf auth login`, $HF_TOKEN): none passes through here, and
what looks like one in the text of an error is blotted out.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs.hub_folder import FILES, WEIGHTS

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )\S+")


def parse(address: str) -> tuple[str, str | None]:
    """Repository ("org/name") and revision (a branch, tag or commit; None: the newest).

    Raises:
        ConfigError: the address is no such one.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigError(f"{address}: an address on the Hub is hf://org/name or hf://org/name@rev")
    return found[1], found[2]


def fetch(address: str, *, download: bool = True) -> Path:
    """Fetches the files of a model into huggingface_hub's cache, or finds them there.

    Args:
        address: of the model.
        download: if not, only look into the cache.

    Returns:
        A folder in the layout of `hub_folder`, whose name is the commit.

    Raises:
        ConfigError: huggingface_hub is not installed; there is no such model or revision, or it is
            not one of mrcnn_jax; it is not in the cache, where `download` is False.
        cli.Failure: it cannot be fetched.
    """
    repository, revision = parse(address)
    package = _package(address)
    try:
        folder = package.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(FILES),
            local_files_only=not download,
            library_name="mrcnn_jax",
        )
    except Exception as error:
        if not download:
            raise ConfigError(
                f"{address}: not fetched yet; with --download it would be, from the Hub"
            ) from None
        raise _explained(address, error, "cannot be fetched") from None
    if not (Path(folder) / WEIGHTS).is_file():
        if not download:
            raise ConfigError(f"{address}: not fetched in full; with --download it would be")
        raise ConfigError(f"{address}: has no {WEIGHTS}: not a model of mrcnn_jax")
    return Path(folder)


def upload(address: str, folder: Path) -> str:
    """Uploads a folder in the layout of `hub_folder` as one commit.

    A repository that is not there is made, and is private.

    Returns:
        The address with its commit, hf://org/name@commit.

    Raises:
        ConfigError: huggingface_hub is not installed, or the address is not one or has a revision.
        cli.Failure: it cannot be uploaded.
    """
    repository, package = refuse_unusable(address)
    try:
        interface = package.HfApi(library_name="mrcnn_jax")
        interface.create_repo(repository, private=True, exist_ok=True)
        commit = interface.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Upload a model of mrcnn_jax",
        )
    except Exception as error:
        raise _explained(address, error, "cannot be uploaded to") from None
    return f"{SCHEME}{repository}@{commit.oid}"


def refuse_unusable(address: str) -> tuple[str, Any]:
    """Raises ConfigError as `upload` does; repository and package."""
    repository, revision = parse(address)
    if revision is not None:
        raise ConfigError(f"{address}: what is uploaded becomes a new revision: leave @ out")
    return repository, _package(address)


def _package(address: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise ConfigError(
            f"{address}: huggingface_hub is not installed (pip install 'huggingface_hub>=1')"
        ) from None


def _explained(address: str, error: Exception, what: str) -> Exception:
    errors = importlib.import_module("huggingface_hub.errors")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(
            f"{address}: no such model on the Hub, or a private one that needs `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{address}: the model has no such revision")
    if isinstance(error, errors.HFValidationError):
        return ConfigError(f"{address}: not a name that the Hub allows")
    reason = " ".join(_TOKEN.sub("...", str(error)).split()) or type(error).__name__
    return cli.Failure(f"{address}: {what}: {reason:.300}")
