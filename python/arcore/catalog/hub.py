"""Published weights on the model hub, fetched through the library `huggingface_hub`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arcore._optional import require
from arcore.catalog.lookup import find, load
from arcore.catalog.system import NOT_PUBLIC, Published

# What stands for a file where the weights are to be fetched.
HUB = "hub"
# What the tokenizer of a language model is called there.
TOKENIZER = "tokenizer.json"
# Seconds to wait for the hub's first answer.
PATIENCE = 5.0


def published(name: str) -> Published:
    """Where a preset's weights are.

    Raises:
        ValueError: it is no preset, it names no place, or its weights are not public.
    """
    entry, preset = find(name)
    if preset is None:
        choices = ", ".join(sorted(entry.presets)) or "none"
        raise ValueError(
            f"weights on the hub belong to a preset, not to the system {name!r}: choose one of {choices}"
        )
    weights = load(entry.presets[preset], preset).preset.weights
    if weights == NOT_PUBLIC:
        raise ValueError(f"the weights of {name} are not public: give a file of your own with weights=FILE")
    if weights is None:
        raise ValueError(f"{name} names no place on the hub: give a file with weights=FILE")
    place: Published = weights
    return place


def fetch(name: str) -> Path:
    """Fetch the published weights of a preset, or find them where an earlier fetch left them.

    `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean for `huggingface_hub`.

    Returns:
        The file with the weights; what belongs to it, such as config.json, lies beside it.

    Raises:
        ImportError: huggingface_hub is missing.
        ValueError: see `published`.
        OSError: the hub cannot be reached, or does not have the files; the message names them.
    """
    place = published(name)
    weights = download(place.repository, (place.file, *place.beside), name)
    if place.tokenizer is not None:
        download(place.tokenizer, (TOKENIZER,), name)
    return weights


def tokenizer_folder(name: str) -> Path | None:
    """The folder in which `fetch` left the tokenizer of a preset whose weights are in another repository, or None."""
    try:
        place = published(name)
        if place.tokenizer is None:
            return None
        hub: Any = require("huggingface_hub", extra="hub")
        found = hub.hf_hub_download(place.tokenizer, TOKENIZER, cache_dir=_cache(), local_files_only=True)
    # Nothing was fetched, or nothing could be; what the library raises depends on its version.
    except Exception:
        return None
    return Path(found).parent


def download(repository: str, files: Sequence[str], wanted_for: str) -> Path:
    """Files of a repository on the hub, into the cache of `huggingface_hub`.

    Args:
        repository: `"owner/name"`.
        files: at least one.
        wanted_for: what the message of an error names.

    Returns:
        The first of the files; the others lie beside it.

    Raises:
        ImportError, OSError: see `fetch`.
    """
    hub: Any = require("huggingface_hub", extra="hub")
    found = []
    for file in files:
        try:
            found.append(_get(hub, repository, file))
        # What the library raises depends on its version and on what its transport raises.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OSError(
                f"cannot fetch {file} of {repository} for {wanted_for}: {reason}; get {', '.join(files)} by other "
                "means into one folder and give that folder"
            ) from error
    return Path(found[0])


def _get(hub: Any, repository: str, file: str) -> str:
    """One file; from the cache where the hub cannot be reached."""
    endpoint = os.environ.get("HF_ENDPOINT") or None
    errors = require("huggingface_hub.errors", extra="hub")
    try:
        # Asked for by itself, since the download repeats a failed request for 25 seconds.
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file, endpoint=endpoint), timeout=PATIENCE)
    except errors.HfHubHTTPError:
        raise  # the hub answered, and does not have it
    except Exception as unreachable:
        try:
            return str(hub.hf_hub_download(repository, file, cache_dir=_cache(), local_files_only=True))
        except Exception:
            raise unreachable from None
    return str(hub.hf_hub_download(repository, file, endpoint=endpoint, cache_dir=_cache()))


def _cache() -> Path | None:
    """Where the library keeps files; None for its own choice."""
    return None
