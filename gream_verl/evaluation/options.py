"""All options of an evaluation, from a YAML file and from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gream_verl.core.errors import InputError
from gream_verl.core.options import file_options
from gream_verl.core.rsvr import Mode

Split = Literal["test", "val"]
Engine = Literal["vllm", "hf", "server"]
Ranking = Literal["beam", "reference"]
Merge = Literal["mean", "max"]


class EvaluationOptions(BaseModel):
    """Options of an evaluation; the names are the keys of ``evaluation.yaml``.

    Attributes:
        modes: ``direct``, ``reasoning`` or both. None: those of the named prompts, reasoning for ``val``, else both.
        split: Held-out interaction to find: ``test`` or ``val``.
        prompts: Parquet file of prompts, ours or the authors'. None: ``<D>-<split>.parquet``, or prompts made from
            ``<D>.inter.json`` where that file is missing or one of the next three is given.
        history: Items per prompt, the most recent ones.
        template: User's turn, with ``{history}`` in it.
        system: System message, "" for none.
        limit: Users in the seeded sample; None takes all.
        skip_missing: Leave out users whose target has no semantic ID, instead of refusing the data.
        beams: Beams per user, and length of the recommended list. 0: no ranking, in reasoning mode only.
        score: Normalise a token's probability over the ``vocabulary``, or over the tokens that lead to ``items``.
        drop_history: Never recommend an item of the user's history.
        cutoffs: Lengths of lists to measure, in addition to 1, 5 and 10.
        batch_size: Sequences computed at once; decides the memory, not the result.
        shards: Workers; more than one run on Ray, each with a GPU or a core.
        engine: Sampler of chains: ``vllm`` in this process, ``hf`` in a plain loop, or the ``server`` at ``endpoint``.
        ranking: ``beam`` search after each chain, or the sampled answers by the probability of the whole response, as
            the authors rank (``reference``).
        merge: Score of an item over several chains: its ``mean`` probability or its ``max``.
        constrained: Allow only real items in sampled answers.
        chains: Chains per user.
        max_tokens: Longest response, in tokens.
        temperature: Sampling temperature, above 0.
        top_p: Share of probability that sampling keeps.
        endpoint: URL of an OpenAI-compatible server, such as ``http://127.0.0.1:8000/v1``.
        served_model: Name of the model on that server; None takes the only one.
        concurrency: Requests to the server at once, per shard.
        timeout: Seconds until a request is given up.
        seed: Seed of the sample of users, the chains, the floors and the bootstrap.
        name: Name of the results; None for the name of the checkpoint's folder.
        overwrite: Replace results of other users or another protocol.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    modes: tuple[Mode, ...] | None = Field(default=None, min_length=1)
    split: Split = "test"
    prompts: Path | None = None
    history: int | None = Field(default=None, ge=1)
    template: str | None = None
    system: str | None = None
    limit: int | None = Field(default=None, ge=1)
    skip_missing: bool = False
    beams: int = Field(default=30, ge=0)
    score: Literal["vocabulary", "items"] = "vocabulary"
    drop_history: bool = True
    cutoffs: tuple[int, ...] = ()
    batch_size: int = Field(default=64, ge=1)
    shards: int = Field(default=1, ge=1)
    engine: Engine = "vllm"
    ranking: Ranking = "beam"
    merge: Merge = "mean"
    constrained: bool = False
    chains: int = Field(default=1, ge=1)
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.6, gt=0)
    top_p: float = Field(default=0.8, gt=0, le=1)
    endpoint: str | None = None
    served_model: str | None = None
    concurrency: int = Field(default=64, ge=1)
    timeout: float = Field(default=600.0, ge=1)
    seed: int = Field(default=0, ge=0)
    name: str | None = None
    overwrite: bool = False


def read_options(file: Path | None, line: Mapping[str, Any]) -> EvaluationOptions:
    """Read the options of an evaluation and check that they fit together.

    Args:
        file: YAML file with any of the options, or None.
        line: Options of the command line; None leaves that of the file.

    Raises:
        InputError: When the file is missing or malformed, or an option is unknown, wrong, or contradicts another.
    """
    options = file_options(EvaluationOptions, file, line, "gream evaluate")
    if (options.engine == "server") != (options.endpoint is not None):
        raise InputError("the engine server needs an endpoint, and no other engine takes one")
    if not options.beams and options.modes != ("reasoning",):
        raise InputError("beams: 0 goes with reasoning mode only; direct mode is a beam search")
    if options.cutoffs and min(options.cutoffs) < 1:
        raise InputError(f"cutoffs: {min(options.cutoffs)}: expected numbers of items, at least 1")
    if 0 < options.beams < max(options.cutoffs, default=0):
        raise InputError(
            f"cutoffs: a list is only as long as beams, {options.beams}; take {max(options.cutoffs)} beams"
        )
    wording = (options.history, options.template, options.system)
    if options.template is not None and "{history}" not in options.template:
        raise InputError(f"template {options.template!r}: has no {{history}}; write it where the SIDs are to stand")
    if options.prompts is not None and any(choice is not None for choice in wording):
        raise InputError(f"{options.prompts}: its prompts have a wording; leave out history, template and system")
    return options
