"""Texts to vectors by vLLM on the nodes of a Ray cluster, for catalogues that outgrow one machine.

Ray Data's processor for vLLM's embedding task does the work: one engine a GPU, or one on a CPU where the cluster has no
GPU. The address of a running cluster is taken from ``RAY_ADDRESS``; without it, Ray is started on this machine.

Tested on a CPU, with local Ray. **It has not been run on GPUs yet.** A model has to fit into one GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_processing.indexing.embed import EmbeddingSettings, default_model, load_encoder
from gream_verl.files import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH_TEXTS = 512
POOLING = {"mean": "MEAN", "lasttoken": "LAST", "cls": "CLS"}
"""Poolings that sentence-transformers and vLLM both have."""
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a text is read once, so that little is kept
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
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
        InputError: When the model cannot be loaded, or does after its transformer what vLLM does not.
    """
    import pyarrow as pa
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.data.DataContext.get_current().enable_progress_bars = False  # ours is enough
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    model = str(default_model() if settings.model is None else settings.model)
    encoder = load_encoder(settings, weights=False)
    pooler, length = pooler_config(encoder, model), encoder.max_seq_length
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        config = vLLMEngineProcessorConfig(
            model_source=model,
            task_type="embed",
            engine_kwargs={
                "dtype": "bfloat16" if gpus else "float32",
                "enforce_eager": not gpus,
                "max_model_len": length,
                "pooler_config": pooler,
                "trust_remote_code": False,
            },
            placement_group_config={"bundles": [{"CPU": 1, "GPU": 1 if gpus else 0}]},
            runtime_env={} if gpus else {"env_vars": CPU_ENVIRONMENT},
            concurrency=gpus or 1,
            batch_size=BATCH_TEXTS,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,
        )
        processor = build_processor(
            config,
            preprocess=lambda row: {
                "shard": row["shard"],
                "row": row["row"],
                "prompt": row["text"],
                "tokenization_kwargs": {"truncation": True, "max_length": length},
            },
            postprocess=lambda row: {"shard": row["shard"], "row": row["row"], "vector": row["embeddings"]},
        )
        blocks = [
            pa.table({"shard": [shard] * len(texts), "row": range(len(texts)), "text": texts})
            for shard, texts in shards.items()
        ]
        yield from _collect(processor(ray.data.from_arrow(blocks)), shards, advance)
    finally:
        if started_here:
            ray.shutdown()


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
