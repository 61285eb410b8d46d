"""Texts to vectors by vLLM on the nodes of a Ray cluster, for catalogues that outgrow one machine.

Ray Data feeds actors that hold a vLLM engine for its embedding task: one a GPU, or a single one where the cluster has
no GPU. The address of a running cluster is taken from ``RAY_ADDRESS``; without it, Ray is started on this machine.
``ray.data.llm`` would do the same, but ray 2.60 restarts an engine that dies on its first batch for ever.

Tested on a CPU, with local Ray. **It has not been run on GPUs yet.** A model has to fit into one GPU.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_processing.indexing.embed import EmbeddingSettings, default_model, load_encoder
from gream_verl.core.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerFast

ERROR = re.compile(r"^\s*([\w.]+(?:Error|Exception): .+)", re.MULTILINE)
BATCH_TEXTS = 512
POOLING = {"mean": "MEAN", "lasttoken": "LAST", "cls": "CLS"}
"""Poolings that sentence-transformers and vLLM both have."""
RESTARTS = 3
"""Of an actor that was killed from outside; an error of its own ends the call at once."""
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a text is read once, so that little is kept
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def encode_with_ray(
    shards: Mapping[int, Sequence[str]], settings: EmbeddingSettings, advance: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of each shard and the pooled vectors of its texts, as soon as a shard is complete.

    Args:
        shards: Number of each shard and its texts.
        settings: How texts become vectors.
        advance: Told how many texts more are done.

    Yields:
        Number and float32 [texts, dimensions], rows in the order of the texts; shards come in any order.

    Raises:
        InputError: When the model cannot be loaded or does what vLLM does not, or when Ray or vLLM fails.
    """
    import pyarrow as pa
    import ray
    from ray.util.annotations import RayDeprecationWarning

    ray.data.DataContext.get_current().enable_progress_bars = False  # ours is enough
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    model = str(default_model() if settings.model is None else settings.model)
    encoder = load_encoder(settings, weights=False)
    arguments = {"model": model, "tokenizer": encoder.tokenizer, "pooler": pooler_config(encoder, model)}
    started_here = not ray.is_initialized()
    if started_here:
        # Without an address Ray would take any cluster that was last started on this machine.
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        blocks = [
            pa.table({"shard": [shard] * len(texts), "row": range(len(texts)), "text": texts})
            for shard, texts in shards.items()
        ]
        with warnings.catch_warnings():
            # The bound of restarts: Ray Data's own is none, and it says that this way to set one will go in 2.64.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            rows = ray.data.from_arrow(blocks).map_batches(
                VllmEncoder,
                fn_constructor_kwargs=arguments,
                batch_size=BATCH_TEXTS,
                compute=ray.data.ActorPoolStrategy(size=gpus or 1),
                num_gpus=1 if gpus else 0,
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
        yield from _collect(rows, shards, advance)
    except ray.exceptions.RayError as error:
        reason = (ERROR.findall(str(error)) or [type(error).__name__])[0]  # the first is what the others followed from
        raise InputError(
            f"{model}: Ray and vLLM could not embed with it ({reason}); call again, or use the engine 'local'"
        ) from error
    finally:
        if started_here:
            ray.shutdown()


class VllmEncoder:
    """A vLLM engine in a process of Ray's."""

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerFast, pooler: dict[str, Any]) -> None:
        import torch

        gpu = torch.cuda.is_available()
        for name, value in ({} if gpu else CPU_ENVIRONMENT).items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no second process that could hang
        from vllm import LLM
        from vllm.config import PoolerConfig

        self.tokenizer = tokenizer
        self.engine = LLM(
            model=model,
            runner="pooling",
            convert="embed",
            dtype="bfloat16" if gpu else "float32",
            max_model_len=tokenizer.model_max_length,
            pooler_config=PoolerConfig(**pooler),
            enforce_eager=not gpu,
            disable_log_stats=True,
            trust_remote_code=False,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Put the vectors of ``batch["text"]`` in its place, float32 [texts, dimensions]."""
        # Our own tokenizer: it cuts, lowers and marks texts as in this process.
        tokens = self.tokenizer(batch.pop("text").tolist(), truncation=True).input_ids
        outputs = self.engine.embed([{"prompt_token_ids": ids} for ids in tokens], use_tqdm=False)
        return batch | {"vector": np.array([output.outputs.embedding for output in outputs], np.float32)}


def pooler_config(encoder: SentenceTransformer, model: str) -> dict[str, Any]:
    """Return vLLM's settings of what follows the transformer, so that it does what ``encoder`` does.

    They are all said: what vLLM would choose by itself is not what sentence-transformers would.

    Raises:
        InputError: When ``encoder`` does something that vLLM does not.
    """
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    kinds = [type(module) for module in encoder]
    mode = next((module.pooling_mode for module in encoder if isinstance(module, Pooling)), None)
    shapes = ([Transformer, Pooling], [Transformer, Pooling, Normalize])
    transformer = encoder[0]
    chats = isinstance(transformer, Transformer) and "message" in transformer.modality_config
    if chats or kinds not in shapes or not isinstance(mode, str) or mode not in POOLING:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise InputError(
            f"{model}: the engine 'ray' cannot run {names} with the pooling {mode!r}{' and a chat template' * chats}; "
            "use the engine 'local', or the pooling 'mean' or 'last'"
        )
    return {"seq_pooling_type": POOLING[mode], "use_activation": kinds == shapes[1]}


def _collect(
    rows: Any, shards: Mapping[int, Sequence[str]], advance: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Put rows, which come in any order, back into their shards; yield a shard when its last row is there."""
    left = {shard: len(texts) for shard, texts in shards.items()}
    begun: dict[int, np.ndarray] = {}
    for batch in rows.iter_batches(batch_size=None, batch_format="numpy"):
        for shard, row, vector in zip(batch["shard"].tolist(), batch["row"].tolist(), batch["vector"], strict=True):
            if shard not in begun:
                begun[shard] = np.empty((len(shards[shard]), len(vector)), np.float32)
            begun[shard][row] = vector
            left[shard] -= 1
            if not left[shard]:
                yield shard, begun.pop(shard)
        advance(len(batch["row"]))
