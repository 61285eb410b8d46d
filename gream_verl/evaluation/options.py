"""All options of an evaluation, from a YAML file and from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gream_verl.core.errors import InputError
from gream_verl.core.options import file_options
from gream_verl.core.rsvr import Mode
from gream_verl.decoding.chains import Merge

Split = Literal["test", "val"]
Engine = Literal["vllm", "hf", "server"]
Ranking = Literal["beam", "reference"]


def engine_of_this_machine() -> Engine:
    """Return vLLM where there is a GPU; on CPU cores the plain loop is faster for a tiny model."""
    import torch

    return "vllm" if torch.cuda.is_available() and find_spec("vllm") else "hf"


class EvaluationOptions(BaseModel):
    """Options of an evaluation; the names are the keys of ``evaluation.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # The users, and the wording of their prompts; history, template and system each make the prompts.
    modes: tuple[Mode, ...] | None = Field(default=None, min_length=1)  # None: those of the prompts or of the split
    split: Split = "test"  # the held-out interaction to find
    prompts: Path | None = None  # parquet file, ours or the authors'; None: the run's, else made of its interactions
    history: int | None = Field(default=None, ge=1)  # items per prompt, the most recent ones
    template: str | None = None  # the user's turn, with {history} in it
    system: str | None = None  # "" for none
    limit: int | None = Field(default=None, ge=1)  # users in the seeded sample; None takes all
    skip_missing: bool = False  # leave out users whose target, or an item shown, has no semantic ID

    # The ranking.
    beams: int = Field(default=30, ge=0)  # also the length of the lists; 0: no ranking, in reasoning mode only
    score: Literal["vocabulary", "items"] = "vocabulary"  # tokens over which a probability is normalised
    drop_history: bool = True  # never recommend an item of the user's history
    cutoffs: tuple[Annotated[int, Field(ge=1)], ...] = ()  # lengths of lists to measure, in addition to 1, 5 and 10
    batch_size: int = Field(default=64, ge=1)  # sequences computed at once; decides the memory, not the result
    shards: int = Field(default=1, ge=1)  # workers; more than one run on Ray, each with a GPU or a core

    # Reasoning mode.
    # Sampler of chains: vllm in this process (default with a GPU), hf in a plain loop, or the server at `endpoint`.
    engine: Engine = Field(default_factory=engine_of_this_machine)
    ranking: Ranking = "beam"  # beam search after each chain, or the authors': probability of the sampled response
    merge: Merge = "mean"  # score of an item over several chains
    constrained: bool = False  # allow only real items in sampled answers
    chains: int = Field(default=1, ge=1)  # per user
    max_tokens: int = Field(default=256, ge=1)  # of the longest response
    temperature: float = Field(default=0.6, ge=0)  # 0: the one chain of the most likely tokens, as `gream serve` has it
    top_p: float = Field(default=0.8, gt=0, le=1)  # share of probability that sampling keeps
    endpoint: str | None = None  # URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1
    served_model: str | None = None  # name of the model on that server; None takes the only one
    concurrency: int = Field(default=64, ge=1)  # requests to the server at once, per shard
    timeout: float = Field(default=600.0, ge=1)  # seconds until a request is given up

    seed: int = Field(default=0, ge=0)  # of the sample of users, the chains, the floors and the bootstrap
    name: str | None = None  # of the results; None: the checkpoint's folder
    overwrite: bool = False  # replace results of other users or another protocol


def read_options(file: Path | None, line: Mapping[str, Any]) -> EvaluationOptions:
    """Read the options of an evaluation from a file and the command line, and check that they fit together."""
    options = file_options(EvaluationOptions, file, line, "gream evaluate")
    longest = max(options.cutoffs, default=0)
    if (options.engine == "server") != (options.endpoint is not None):
        raise InputError("the engine server needs an endpoint, and no other engine takes one")
    if not options.temperature and options.chains > 1:
        raise InputError("temperature: 0 takes the most likely tokens, which are one chain; set chains to 1")
    if not options.beams and options.modes != ("reasoning",):
        raise InputError("beams: 0 goes with reasoning mode only; direct mode is a beam search")
    if 0 < options.beams < longest:
        raise InputError(f"cutoffs: a list is only as long as beams, {options.beams}; take {longest} beams")
    if options.template is not None and "{history}" not in options.template:
        raise InputError(f"template {options.template!r}: has no {{history}}; write it where the SIDs are to stand")
    if options.prompts is not None and (options.history, options.template, options.system) != (None, None, None):
        raise InputError(f"{options.prompts}: its prompts have a wording; leave out history, template and system")
    return options
