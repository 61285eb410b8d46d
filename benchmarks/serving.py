"""Serving over loopback HTTP: ours against Hugging Face ``generate`` behind FastAPI, and against vLLM's own server.

    python benchmarks/serving.py                      # takes a finished quickstart; about 15 minutes
    python benchmarks/serving.py RUN CHECKPOINT --items 10 --against hugging-face
    python benchmarks/serving.py --against --million  # ours alone, and with a random index of a million items

- ``hugging-face`` is what people write: beam search with a ``prefix_allowed_tokens_fn``, one request after the other.
  It gets our prompt and number of beams and leaves out the items of the history. Complete semantic IDs take beams of
  longer ones there, and their ends are scored: the lists can differ from ours after their first items.
- ``vllm`` searches with ``k`` beams and knows no index: some of its answers are no items.

The servers run one at a time with one thread each, as `gream serve` does: on few busy cores two are slower. The load
comes from this process; two cores are too few to pin it elsewhere, and it takes their time from all servers alike. In
a closed loop each client asks again when it has its answer; what comes after all have their first one is measured. In
an open loop requests arrive at random (Poisson) at a share of our highest throughput; latency counts from the moment
at which one is due.
The results go to RUN/serving.json and RUN/serving.png.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import aiohttp
import numpy as np
import psutil
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from gream_verl.core.cpu_environment import set_defaults
from gream_verl.core.files import atomic_path, write_json
from gream_verl.core.prompts import messages
from gream_verl.core.run_folder import RunFolder
from gream_verl.core.semantic_ids import ItemIndex, parse_sid
from gream_verl.model.loading import load_model, load_tokenizer, resolve_model
from gream_verl.model.tiny_model import make_tiny_model

HISTORY, BEAMS = 20, 30  # those of `gream serve`: latest items of a history, and least beams
SHARES = (0.5, 0.8, 0.95)  # of our highest throughput, in open loops
START, ANSWER, STOP = 600.0, 120.0, 30.0  # most seconds until a server has started, answered, stopped
OURS, RIVALS, MILLION = "ours", ["hugging-face", "vllm"], 1_000_000
GREAM = [sys.executable, "-c", "from gream_verl.cli.main import main; main()", "serve"]
VLLM = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--served-model-name", "it"]
VLLM += ["--dtype", "float32", "--enforce-eager", "--generation-config", "vllm", "--uvicorn-log-level", "warning"]

FORMS = {("closed", "p50 ms"): "o-", ("closed", "p99 ms"): "o:", ("open", "p50 ms"): "x", ("open", "p99 ms"): "+"}

Lists = list[list[str | None]]  # recommended items, None for an answer that is no item


@dataclass(frozen=True)
class Server:
    """A server to measure: its command without the port, its index, histories to ask for, clients of closed loops."""

    name: str
    command: Sequence[str]
    index: ItemIndex
    histories: Sequence[list[str]]
    clients: Sequence[int]
    path: ClassVar[str] = "/v1/recommend"

    def question(self, history: list[str], k: int) -> dict[str, Any]:
        """Return the body of a request."""
        return {"history": history, "k": k}

    def items(self, answer: Any) -> list[str | None]:
        """Return the items of the body of an answer."""
        return [item["id"] if item["id"] in self.index.sids else None for item in answer["items"]]


class VllmServer(Server):
    """vLLM's OpenAI server."""

    path = "/v1/chat/completions"

    def question(self, history: list[str], k: int) -> dict[str, Any]:
        """Return a chat with the prompt of direct mode."""
        chat = messages("".join(self.index.texts(history)), "direct")
        tokens = max(map(len, self.index.sids.values())) + 1  # the last one is the end
        search = {"use_beam_search": True, "n": k, "max_tokens": tokens, "temperature": 0, "length_penalty": 0}
        return {"model": "it", "messages": chat, **search}

    def items(self, answer: Any) -> list[str | None]:
        """Return the items whose semantic IDs are the texts of an answer."""
        sids = [parse_sid(choice["message"]["content"].strip()) for choice in answer["choices"]]
        return [self.index.items.get(sid) if sid else None for sid in sids]


class Reply(NamedTuple):
    """The seconds from when it was due to an answer, when that came, the HTTP status (0: none came), and the body."""

    seconds: float
    end: float
    status: int
    body: bytes


Ask = Callable[..., Awaitable[Reply]]
Loop = Callable[..., Awaitable[tuple[list[Reply], float]]]  # returns replies and the seconds in which they came


async def in_turn(ask: Ask, requests: int) -> tuple[list[Reply], float]:
    start = time.perf_counter()
    return [await ask() for _ in range(requests)], time.perf_counter() - start


async def closed_loop(ask: Ask, clients: int, seconds: float) -> tuple[list[Reply], float]:
    begin, warm, replies = float("inf"), 0, list[Reply]()

    async def client() -> None:
        nonlocal begin, warm
        await ask()
        warm += 1
        if warm == clients:
            begin = time.perf_counter()
        while time.perf_counter() < begin + seconds:
            replies.append(await ask())

    await asyncio.gather(*(client() for _ in range(clients)))
    return [reply for reply in replies if reply.end >= begin], time.perf_counter() - begin


async def open_loop(ask: Ask, rate: float, seconds: float, seed: int) -> tuple[list[Reply], float]:
    generator, begin, tasks = np.random.default_rng(seed), time.perf_counter(), []
    for due in begin + np.sort(generator.uniform(0, seconds, generator.poisson(rate * seconds))):
        await asyncio.sleep(due - time.perf_counter())
        tasks.append(asyncio.ensure_future(ask(float(due))))
    return await asyncio.gather(*tasks), time.perf_counter() - begin


async def replies_of(server: Server, url: str, k: int, loop: Loop) -> tuple[list[Reply], float]:
    """Ask for ``k`` items for each history in turn, from the first on, when ``loop`` says so."""
    questions = cycle([json.dumps(server.question(history, k)).encode() for history in server.histories])
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=ANSWER)
    headers = {"content-type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:

        async def ask(due: float | None = None) -> Reply:
            due, status, body = due or time.perf_counter(), 0, b""
            with suppress(aiohttp.ClientError, TimeoutError):
                async with session.post(url + server.path, data=next(questions)) as answer:
                    body, status = await answer.read(), answer.status  # parsed later, to leave the server its core
            end = time.perf_counter()
            return Reply(end - due, end, status, body)

        return await loop(ask)


def items_of(server: Server, replies: Sequence[Reply], k: int) -> Lists:
    return [server.items(json.loads(reply.body))[:k] if reply.status == 200 else [] for reply in replies]


def measure(server: Server, url: str, k: int, load: str, loop: Loop) -> dict[str, Any]:
    replies, seconds = asyncio.run(replies_of(server, url, k, loop))
    answered = [reply for reply in replies if reply.status == 200]
    milliseconds = [1000 * reply.seconds for reply in answered] or [np.nan]
    recommended = [item for items in items_of(server, answered, k) for item in items]
    found: dict[str, Any] = {"server": server.name, "k": k, "load": load, "requests": len(replies)}
    found["per second"] = len(answered) / seconds
    found |= {f"p{share} ms": float(np.percentile(milliseconds, share)) for share in (50, 90, 99)}
    found["no items %"] = 100 * recommended.count(None) / max(1, len(recommended))
    return found | {"failures": dict(Counter(str(reply.status) for reply in replies if reply.status != 200))}


@contextmanager
def running(server: Server, log_file: Path) -> Iterator[tuple[str, psutil.Popen]]:
    """Start a server, yield its address and its process when it is ready, and stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment, url, deadline = {**os.environ, "GREAM_TOKEN": ""}, f"http://127.0.0.1:{port}", time.monotonic() + START
    set_defaults(environment)
    command = [*server.command, "--port", str(port)]
    with log_file.open("wb") as log:  # in a session of its own, to end with the processes that it starts
        process = psutil.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{server.name} did not start:\n{log_file.read_text(errors='replace')[-3000:]}")
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            time.sleep(0.05)
        yield url, process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, psutil.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(STOP)


def bench(server: Server, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure one server: some lists, closed loops and, where it is ours, open loops."""
    results, lists, start = list[dict[str, Any]](), dict[int, Lists](), time.perf_counter()
    with running(server, folder / "log") as (url, process):
        startup = time.perf_counter() - start
        for k in given.items:
            sample, _ = asyncio.run(replies_of(server, url, k, partial(in_turn, requests=given.sample)))
            lists[k] = items_of(server, sample, k)
            for count in server.clients:
                closed = partial(closed_loop, clients=count, seconds=given.seconds)
                results.append(measure(server, url, k, f"closed, {count}", closed))
            highest = results[-1]["per second"]
            for share in SHARES if server.name == OURS else ():
                opened = partial(open_loop, rate=share * highest, seconds=given.seconds, seed=given.seed)
                results.append(measure(server, url, k, f"open, {share:.0%}", opened))
        memory = sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 2**20
    return {"server": server.name, "startup s": startup, "MiB": memory, "results": results, "lists": lists}


def make_servers(run: RunFolder, given: argparse.Namespace, folder: Path) -> Iterator[Server]:
    """Yield ours, the rivals and, made in ``folder`` when its turn comes, ours with a million items."""
    index, sequences = run.data.read_index([]), run.data.read_inter()
    splits = run.data.read_splits(sequences)
    shown = [items[: splits[user].test or len(items)] for user, items in sequences.items()]
    known = [[item for item in items if item in index.sids][-HISTORY:] for items in shown]
    histories = [known[user] for user in np.random.default_rng(given.seed).permutation(len(known))]
    asked, folders = (index, histories, sorted(given.clients)), [str(run.root), str(given.checkpoint)]
    yield Server(OURS, [*GREAM, *folders], *asked)
    if "hugging-face" in given.against:
        yield Server("hugging-face", [sys.executable, __file__, *folders], *asked)
    if "vllm" in given.against:  # it reads the log-probabilities of twice as many tokens as there are beams
        options = ["--model", str(given.checkpoint), "--max-logprobs", str(2 * max(given.items))]
        yield VllmServer("vllm", [*VLLM, *options], *asked)
    if given.million:
        yield make_million(run, folder, given.seed)


def make_million(run: RunFolder, root: Path, seed: int) -> Server:
    """Write a run of a million items with random semantic IDs of three levels, and an untrained tiny model."""
    made, generator = RunFolder.create(root), np.random.default_rng(seed)
    codes = np.unravel_index(generator.choice(256**3, size=MILLION, replace=False), (256, 256, 256))
    items = [str(number) for number in range(MILLION)]
    index = ItemIndex.from_codes(items, np.stack(codes, axis=1).tolist())
    histories = generator.choice(MILLION, (1000, HISTORY)).astype(str).tolist()
    made.data.root.mkdir(parents=True)
    index.save(made.data.index)
    write_json(made.data.item, {item: {"title": f"Item {item}"} for item in items})
    write_json(made.data.inter, {str(user): history for user, history in enumerate(histories)})
    make_tiny_model(run.data.titles().values(), index, made.sft)
    return Server("ours, a million items", [*GREAM, str(root), str(made.sft)], index, histories, [8])


def serve_hugging_face(run: RunFolder, folder: Path, port: int) -> None:
    """Serve what people write: a lock, ``generate`` and a function that looks up the allowed tokens."""
    import torch
    import uvicorn
    from fastapi import Body, FastAPI

    torch.set_num_threads(1)
    tokenizer, model, index = load_tokenizer(folder), load_model(folder, inference=True), run.data.read_index([])
    ids = dict(zip(index.tokens, tokenizer.convert_tokens_to_ids(index.tokens), strict=True))
    paths = {item: tuple(ids[token] for token in sid) for item, sid in index.sids.items()}

    def beginnings(some: Iterable[tuple[int, ...]]) -> Counter[tuple[int, ...]]:
        return Counter(path[:level] for path in some for level in range(1, len(path) + 1))

    below, following = beginnings(paths.values()), defaultdict[tuple[int, ...], list[int]](list)
    for path in below:
        following[path[:-1]].append(path[-1])

    tokens, end = max(map(len, paths.values())) + 1, tokenizer.eos_token_id

    def generate(history: list[str], k: int) -> list[str]:
        chat = messages("".join(index.texts(history)), "direct")
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        length = prompt["input_ids"].shape[1]
        gone = beginnings({paths[item] for item in history})
        closed = {path for path, count in gone.items() if count == below[path]}

        def allowed(_: int, sequence: torch.Tensor) -> list[int]:
            path = tuple(sequence[length:].tolist())
            return [one for one in following.get(path, ()) if (*path, one) not in closed] or [end]

        found = model.generate(
            **prompt, num_beams=max(BEAMS, k), num_return_sequences=k, max_new_tokens=tokens, do_sample=False,
            length_penalty=0.0, early_stopping=False, use_cache=True, prefix_allowed_tokens_fn=allowed,
        )  # fmt: skip
        return tokenizer.batch_decode(found[:, length:], skip_special_tokens=True)

    app, lock = FastAPI(), asyncio.Lock()

    @app.post(Server.path)
    async def recommend(history: list[str] = Body(), k: int = Body()) -> dict[str, Any]:  # noqa: B008
        async with lock:
            texts = await asyncio.to_thread(generate, history, k)
        return {"items": [{"id": index.items.get(parse_sid(text) or (), text)} for text in texts]}

    @app.get("/health")
    def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def compare(benches: Sequence[dict[str, Any]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return, for each ``k``, our tail at 80% load and, for each rival, the ratio of throughput and the equal lists."""
    summary: list[dict[str, Any]] = []
    ours, *others = benches
    results = {(one["server"], one["k"], one["load"]): one for bench in benches for one in bench["results"]}
    for k in given.items:
        lone, most = (f"closed, {count}" for count in (min(given.clients), max(given.clients)))
        tail = results[OURS, k, "open, 80%"]["p99 ms"] / results[OURS, k, lone]["p50 ms"]
        summary.append({"k": k, "p99 at 80% over lone p50": tail})
        for name, lists in ((other["server"], other["lists"][k]) for other in others if other["server"] in RIVALS):
            pairs = list(zip(ours["lists"][k], lists, strict=True))
            equal = [(one[:1] == other[:1], one == other, len({*one} & {*other}) / k) for one, other in pairs]
            first, whole, shared = np.mean(equal, axis=0).tolist()
            ratio = results[OURS, k, most]["per second"] / (results[name, k, most]["per second"] or np.nan)
            shares = {"first items equal": first, "lists equal": whole, "items in both": shared}
            summary[-1][name] = {"throughput, ours over theirs": ratio, **shares}
    return summary


def draw(benches: Sequence[dict[str, Any]], items: Sequence[int], path: Path) -> None:
    """Draw latency against throughput: lines for closed loops, crosses for open ones."""
    figure = Figure(figsize=(6 * len(items), 5), layout="tight")
    for k, axes in zip(items, figure.subplots(1, len(items), squeeze=False).flat, strict=True):
        for color, bench in enumerate(benches):
            for (loop, latency), form in FORMS.items():
                some = [one for one in bench["results"] if one["k"] == k and one["load"].startswith(loop)]
                label, places = f"{bench['server']}, {loop}, {latency}", [one["per second"] for one in some]
                if some:
                    axes.plot(places, [one[latency] for one in some], form, color=f"C{color}", label=label)
        axes.set(title=f"{k} items", xlabel="requests per second", ylabel="ms", yscale="log")
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"), help="a finished quickstart")
    parser.add_argument("checkpoint", nargs="?", type=Path, help="its model; default: RUN/srpo, else RUN/sft")
    parser.add_argument("--items", type=int, nargs="+", default=[10, 50], help="items to recommend")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="clients of the closed loops")
    parser.add_argument("--seconds", type=float, default=10, help="seconds of each measurement")
    parser.add_argument("--sample", type=int, default=50, help="histories whose lists are compared")
    parser.add_argument("--against", nargs="*", choices=RIVALS, default=RIVALS, help="other servers")
    parser.add_argument("--million", action="store_true", help="also serve a random index of a million items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # serve with Hugging Face
    given = parser.parse_args()
    run, console = RunFolder.open(given.run), Console()
    given.checkpoint = resolve_model(given.checkpoint or run.trained)
    if given.port:
        serve_hugging_face(run, given.checkpoint, given.port)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that no server stays
    benches: list[dict[str, Any]] = []
    settings = {"cores": os.cpu_count()} | {name: str(value) for name, value in vars(given).items()}
    with tempfile.TemporaryDirectory() as folder:
        for server in make_servers(run, given, Path(folder) / "run"):
            benches.append(bench(server, given, Path(folder)))
            summary = compare(benches, given)
            draw(benches, given.items, run.root / "serving.png")
            write_json(run.root / "serving.json", {**settings, "summary": summary, "servers": benches}, indent=1)
    results = [result for one in benches for result in one["results"]]
    table = Table(*results[0])
    for result in results:
        table.add_row(*(f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in result.values()))
    console.print(table)
    for one in benches:
        console.print(f"{one['server']}: ready after {one['startup s']:.1f} s, {one['MiB']:,.0f} MiB")
    console.print_json(data=summary)


if __name__ == "__main__":
    main()
