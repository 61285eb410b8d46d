"""A small server of the OpenAI API's completions: a Hugging Face model behind plain HTTP, as text, without vLLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gream_verl.core.token_text import TokenText
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.sampling import HuggingFaceSampler
from gream_verl.model.loading import load_model, load_tokenizer

Reply = tuple[int, bytes]
Change = Callable[[dict[str, Any]], None]


class CompletionServer:
    """Answers on loopback, one request at a time.

    Args:
        folder: A Hugging Face model.
        change: What to do to an answer before it is sent.

    Attributes:
        url: Base URL.
        requests: The body of every request for a completion.
        keys: The header with the API key of each.
        faults: Replies that go out first, in place of answers.
        models: The list of models; None answers 404 instead.
    """

    def __init__(self, folder: Path, change: Change | None = None) -> None:
        self.model, self.tokenizer = load_model(folder, inference=True), load_tokenizer(folder)
        pieces = TokenText(self.tokenizer).pieces
        self.pieces = [*pieces, *[""] * (self.model.config.vocab_size - len(pieces))]
        self.change = change
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[Reply] = []
        self.models: list[str] | None = ["tiny"]
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[CompletionServer]:
        """Serve until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = False  # closing waits for requests that the client gave up
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if owner.models is None:
                    return self._reply(404, b"{}")
                cards = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in owner.models]
                return self._reply(200, json.dumps({"object": "list", "data": cards}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    owner.keys.append(self.headers["Authorization"])
                    owner.requests.append(body)
                    status, reply = owner.faults.pop(0) if owner.faults else (200, owner.complete(body))
                self._reply(status, reply)

            def _reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler

    def complete(self, body: dict[str, Any]) -> bytes:
        """Return the body of an answer."""
        assert body["n"] == 1
        ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        options = EvaluationOptions(
            temperature=body["temperature"] or 1, top_p=body["top_p"], max_tokens=body["max_tokens"]
        )
        eos = self.tokenizer.eos_token_id
        seed = body["seed"] if body["temperature"] else None
        [response] = HuggingFaceSampler(self.model, options, eos).sample([(ids, seed)])
        ended = response.tokens[-1] == eos
        unknown = len(self.pieces) - 1
        tokens = [self.pieces[min(token, unknown)] for token in response.tokens[: len(response.tokens) - ended]]
        answer = {
            "id": "x",
            "object": "text_completion",
            "choices": [
                {
                    "index": 0,
                    "text": "".join(tokens),
                    "finish_reason": "stop" if ended else "length",
                }
            ],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": len(response.tokens)},
        }
        if self.change:
            self.change(answer)
        return json.dumps(answer).encode()
