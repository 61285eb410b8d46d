"""The parts of the page of `gream serve`: a field that searches, a list that moves, a column for a model."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from nicegui import background_tasks, ui
from nicegui.elements.mixins.text_element import TextElement
from nicegui.events import ValueChangeEventArguments

from gream_verl.serving.forms import (
    MOST_HISTORY,
    PARTS,
    Branch,
    Chain,
    ItemName,
    RecommendRequest,
    ScoredItem,
    ServedMode,
    read_chain,
)  # fmt: skip
from gream_verl.serving.service import RefusedError, Service

K, FOUND = 10, 20
"""Items of a list, and matches of a search."""
PAUSE = 0.25
"""Seconds without a key after which a search begins."""
KEPT = "Denoised history"


def text(tag: str, content: str = "", classes: str = "") -> TextElement:
    """Add an element with a text, which is escaped."""
    return TextElement(tag=tag, text=content).classes(classes)


@contextmanager
def card(name: str, classes: str = "") -> Iterator[TextElement]:
    """Add a section, and yield the heading that names it."""
    with ui.element("section").classes(f"card {classes}") as section:
        heading = text("h2", name)
        section.props["aria-labelledby"] = heading.html_id
        yield heading


def focus(element: ui.element) -> None:
    """Move the keyboard to an element that was perhaps just added."""
    script = f"requestAnimationFrame(() => document.getElementById('{element.html_id}')?.focus())"
    element.client.run_javascript(script)


class Finder:
    """A field with the matches for its text as buttons; Enter takes the first, also before the matches are shown.

    Args:
        label: Label of the field.
        search: Finds keys and their captions for a text, in a thread.
        choose: Takes a key.
    """

    def __init__(
        self, label: str, search: Callable[[str], list[tuple[str, str]]], choose: Callable[[str], None]
    ) -> None:
        self._search, self._choose = search, choose
        self.field = ui.input(label, on_change=self._show).props("outlined dense autocomplete=off")
        self.field.on("keydown.enter", self._take_first)
        self._found = ui.element("ul").props("aria-live=polite").classes("found")
        self._found.props["aria-label"] = f"{label}: matches"

    async def _show(self) -> None:
        typed = self._typed
        if typed:
            await asyncio.sleep(PAUSE)
        found = await asyncio.to_thread(self._search, typed) if typed and typed == self._typed else []
        if typed != self._typed:
            return  # more was typed meanwhile
        self._found.clear()
        with self._found:
            for key, caption in found:
                with ui.element("li"):
                    ui.button(caption, on_click=partial(self._take, key)).props("flat dense no-caps align=left")
            if typed and not found:
                with ui.element("li"):
                    text("span", "No match.").classes("muted")

    async def _take_first(self) -> None:
        typed = self._typed
        found = await asyncio.to_thread(self._search, typed) if typed else []
        if found:
            self._take(found[0][0])

    @property
    def _typed(self) -> str:
        return (self.field.value or "").strip()

    def _take(self, key: str) -> None:
        self.field.value = ""
        self._found.clear()
        focus(self.field)
        self._choose(key)


class Ranking:
    """A list of items, with what moved since the list before.

    Args:
        name: Its heading.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._titles: dict[str, str] = {}
        self._lines: dict[str, ui.element] = {}
        self._box = ui.element("div")

    def show(self, items: Sequence[ItemName], is_fresh: bool) -> None:
        """Show items, the best first; a fresh list is compared with none."""
        before = {} if is_fresh else self._titles
        self._titles = {item.id: item.title for item in items}
        places = {item: place for place, item in enumerate(before, 1)}
        self._lines = {}
        self._box.clear().classes(remove="stale")
        with self._box:
            with ui.element("ol").classes("ranking").props("role=list"):
                for rank, item in enumerate(items, 1):
                    with ui.element("li"):
                        with ui.element("div").classes("line") as self._lines[item.id]:
                            text("span", str(rank), "rank")
                            text("span", item.title, "title")
                            if before:
                                _add_movement(places.get(item.id), rank)
                        if isinstance(item, ScoredItem):
                            _add_path(item)
            gone = [title for item, title in before.items() if item not in self._titles]
            if gone:
                text("p", f"Left the list: {', '.join(gone)}", "muted")

    def clear(self) -> None:
        """Show nothing, and forget it."""
        self._titles = {}
        self._box.clear().classes(remove="stale")

    def wait(self) -> None:
        """Show that another list is computed."""
        self._box.classes("stale")

    def mark(self, item: str) -> int:
        """Mark the held-out item, and return its rank; 0 when it is not here."""
        if item not in self._titles:
            return 0
        if item in self._lines:
            with self._lines.pop(item):  # once
                text("span", "held out", "held")
        return list(self._titles).index(item) + 1


def _add_movement(place: int | None, rank: int) -> None:
    if place == rank:
        return
    if place is None:
        text("span", "new", "new")
        return
    name, arrow = ("up", "▲") if place > rank else ("down", "▼")
    mark = text("span", f"{arrow} {abs(place - rank)}", name).props("role=img")
    mark.props["aria-label"] = f"{name} {abs(place - rank)}"


def _add_path(item: ScoredItem) -> None:
    """Show the codes of an item, and on demand the other items on each branch."""
    codes = [branch.token.removeprefix("<|").removesuffix("|>") for branch in item.path]
    with ui.element("details"):
        with ui.element("summary"):
            text("code", " › ".join(codes))
        for depth, branch in enumerate(item.path):
            with ui.element("div").classes("branch").style(f"margin-left: {0.6 * depth}rem"):
                text("code", codes[depth])
                text("span", _others(branch))
        text("p", f"Log-probability {item.score:.2f} nats", "muted")


def _others(branch: Branch) -> str:
    if branch.items == 1:
        return ": this item alone"
    titles = "; ".join(other.title for other in branch.some)
    more = branch.items - 1 - len(branch.some)
    return f": {branch.items:,} items, also {titles}" + (f" and {more:,} more" if more else "")


class Column:
    """A model in a mode: its chains as they are written, its list, and its latency.

    Args:
        service: The served models.
        choices: Model and mode by the label of each.
        label: The one to begin with.
        shown: Is called after a list was shown.

    Attributes:
        ranking: The list.
    """

    def __init__(
        self, service: Service, choices: dict[str, tuple[str, ServedMode]], label: str, shown: Callable[[], None]
    ) -> None:
        self._service, self._choices, self._shown = service, choices, shown
        self._history: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self._number = 0
        with card(label) as self._heading:
            if len(choices) > 1:
                select = ui.select(list(choices), value=label, label="Mode and model", on_change=self._change)
                select.props("outlined dense")
            self._status = text("p", "", "muted").props("role=status")
            self._warning = text("p", "", "down").props("role=status")
            self._chains = ui.element("div")
            self.ranking = Ranking(label)

    def _change(self, event: ValueChangeEventArguments) -> None:
        self._heading.text = self.ranking.name = event.value
        self.start(self._history, is_fresh=False)

    def stop(self) -> None:
        """End what is still computed."""
        self._number += 1
        if self._task is not None:
            self._task.cancel()

    def start(self, history: list[str], is_fresh: bool) -> None:
        """Compute and show the list for a history; a fresh one is compared with none."""
        self.stop()
        self._history = history
        self._chains.clear()
        self._warning.text = self._status.text = ""
        if not history:
            self.ranking.clear()
            return
        self._status.text = "Computing …"
        if is_fresh:
            self.ranking.clear()
        self.ranking.wait()
        self._task = background_tasks.create(self._compute(self._number, is_fresh))

    async def _compute(self, number: int, is_fresh: bool) -> None:
        """Show an answer, unless another one was asked for meanwhile."""
        model, mode = self._choices[self.ranking.name]
        catalogue = self._service.bundle(model).recommender.catalogue
        written: defaultdict[int, str] = defaultdict(str)
        boxes: defaultdict[int, dict[str, TextElement]] = defaultdict(self._add_chain)

        def write(chain: int, piece: str) -> None:
            if number == self._number:
                written[chain] += piece
                _show_chain(boxes[chain], read_chain(written[chain], catalogue))

        given = RecommendRequest(history=self._history[-MOST_HISTORY:], k=K, mode=mode, model=model, explain=True)
        try:
            answer = await self._service.recommend(given, write)
        except RefusedError as error:
            if number == self._number:
                self._status.text, self._warning.text = "", f"No answer ({error.status}): {error.reason}."
            return
        except Exception:
            if number == self._number:
                self._status.text, self._warning.text = "", "No answer: the log of the service says why."
            raise
        if number == self._number:
            total = answer.milliseconds.pop("total")
            parts = ", ".join(f"{part} {taken:,.0f} ms" for part, taken in answer.milliseconds.items())
            self._status.text = f"{total:,.0f} ms ({parts})"
            self._warning.text = " ".join(filter(None, (answer.fallback, answer.shortage)))
            self.ranking.show(answer.items, is_fresh)
            self._shown()

    def _add_chain(self) -> dict[str, TextElement]:
        """Add the parts of a chain; an empty one is hidden."""
        parts: dict[str, TextElement] = {}
        with self._chains, ui.element("dl").classes("chain").props('aria-label="Chain of thought"'):
            for name in ("Thought", *PARTS, KEPT):
                with ui.element("div"):
                    text("dt", name)
                    parts[name] = text("dd")
        return parts


def _show_chain(box: dict[str, TextElement], chain: Chain) -> None:
    parts = {"Evidence": chain.evidence, "Preference": chain.preference, "Intent": chain.intent}
    parts |= {"Thought": "" if any(parts.values()) else chain.text}
    kept = Counter(item.title for item in chain.history)
    parts |= {KEPT: "; ".join(f"{title} ×{times}" if times > 1 else title for title, times in kept.items())}
    for name, content in parts.items():
        box[name].text = content
