"""The page of `gream serve`: a history, its recommendations side by side, and the reasons for them."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from itertools import islice
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import RedirectResponse
from nicegui import app as gui
from nicegui import background_tasks, ui

from gream_verl.serving.catalogue import Catalogue
from gream_verl.serving.forms import ServedMode, named
from gream_verl.serving.page_parts import FOUND, Column, Finder, K, Ranking, card, focus, text
from gream_verl.serving.recommender import HISTORY
from gream_verl.serving.service import Service

NO_REASONING = "Reasoning is off. Start the service with --reasoning, or with --endpoint URL."
TRUSTED = "gave the token"
CSS = Path(__file__).with_name("page.css")


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page, to which ``/`` leads; a process has one such application, because NiceGUI keeps global state."""
    gui.storage.max_tab_storage_age = 12 * 3600.0  # seconds; the log of a proxy may hold the id of a trusted tab

    @ui.page("/")
    async def page() -> None:
        ui.add_css(CSS)
        is_trusted = service.settings.token is None
        if not is_trusted:
            await ui.context.client.connected(timeout=50.0)  # the tab is known then; NiceGUI gives up at 60 s, loudly
            is_trusted = TRUSTED in gui.storage.tab
        (_View if is_trusted else _ask_for_token)(service)

    @app.get("/", include_in_schema=False)
    def lead() -> Response:
        return RedirectResponse("page/")

    # Mounted at / it would answer what the other routes refuse, an unknown call for one, with a page.
    ui.run_with(
        app, mount_path="/page", title="gream", language="en-US", dark=None, tailwind=False, show_welcome_message=False,
        reconnect_timeout=30.0,  # seconds for which a page outlives a connection that was lost
    )  # fmt: skip


def _ask_for_token(service: Service) -> None:
    """Ask for the token, and show nothing else before it is given."""

    def enter() -> None:
        if service.is_token((field.value or "").encode()):
            gui.storage.tab[TRUSTED] = True  # in this process: the tab may load the page again
            box.clear()
            with box:
                _View(service)
        else:
            wrong.text = "This is not the token."

    with ui.element("div") as box, ui.element("div").classes("columns"), ui.element("section").classes("card"):
        text("h1", "gream")
        field = ui.input("Token", password=True).props("outlined autofocus autocomplete=current-password")
        field.on("keydown.enter", enter)
        wrong = text("p", "", "down").props("role=alert")
        ui.button("Enter", on_click=enter).props("outline no-caps")


class _View:
    """The page of one client.

    Args:
        service: The served models.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._user, self._is_revealed = service, "", False
        self._history: list[str] = []
        self._counting: asyncio.Task[None] | None = None
        with ui.element("header"):
            text("h1", "gream")
            text("span", self._described(), "muted")
        with ui.element("div").classes("columns"):  # in the `main` of NiceGUI
            with card("History", "narrow"):
                self._add_history()
            self._columns = self._add_columns()
            with ui.element("div").classes("narrow"):
                self._cooccurrence, self._popularity = _add_ranking("Co-occurrence"), _add_ranking("Popularity")
        ui.context.client.on_delete(self._stop)

    @property
    def _catalogue(self) -> Catalogue:
        return self._service.bundle(None).recommender.catalogue

    def _described(self) -> str:
        catalogue, models = self._catalogue, ", ".join(self._service.bundles)
        return f"{len(catalogue.index):,} items, {len(catalogue.held_out):,} test users; served: {models}"

    def _add_history(self) -> None:
        Finder("Test user", self._find_users, self._choose_user)
        if self._catalogue.held_out:
            ui.button("Any user", on_click=self._choose_any).props("flat dense no-caps")
        self._item_finder = Finder("Add a title", self._find_items, self._add)
        self._said = text("p", "Choose a test user, or add titles.", "muted").props("role=status")
        self._reveal = ui.button("Reveal the held-out item", on_click=self._show_held_out)
        self._reveal.props("outline dense no-caps").set_visibility(False)
        self._held_out = text("p", "").props("role=status")
        self._listed = ui.element("ol").classes("history").props('aria-label="Items, the latest first"')

    def _add_columns(self) -> list[Column]:
        modes: dict[ServedMode, str] = {"direct": "Direct", "reasoning": "Reasoning"}
        thinkers = [name for name, bundle in self._service.bundles.items() if bundle.thinker is not None]
        choices: dict[str, tuple[str, ServedMode]] = {
            f"{label} · {name}": (name, mode)
            for mode, label in modes.items()
            for name in (self._service.bundles if mode == "direct" else thinkers)
        }
        labels = list(choices)
        second = f"Reasoning · {thinkers[0]}" if thinkers else labels[-1]
        shown = list(dict.fromkeys([labels[0], second]))
        columns = [Column(self._service, choices, label, self._mark_held_out) for label in shown]
        if not thinkers:
            text("p", NO_REASONING, "card muted")
        return columns

    def _find_users(self, typed: str) -> list[tuple[str, str]]:
        catalogue = self._catalogue
        found = sorted(
            (user for user in catalogue.held_out if user.startswith(typed)), key=lambda user: (len(user), user)
        )
        return [(user, f"User {user}, {len(catalogue.histories[user]):,} items") for user in found[:FOUND]]

    def _find_items(self, typed: str) -> list[tuple[str, str]]:
        catalogue = self._catalogue
        return [(item, catalogue.texts[item].title) for item in catalogue.search(typed, FOUND)]

    def _title(self, item: str) -> str:
        texts = self._catalogue.texts  # the index may lack an item of the data set
        return texts[item].title if item in texts else f"item {item}, not in the index"

    def _choose_any(self) -> None:
        self._choose_user(random.choice(list(self._catalogue.held_out)))

    def _choose_user(self, user: str) -> None:
        self._user, self._is_revealed = user, False
        self._held_out.text = ""
        self._reveal.set_visibility(user in self._catalogue.held_out)
        self._take(list(self._catalogue.histories[user]), f"User {user}", is_fresh=True)

    def _add(self, item: str) -> None:
        self._take([*self._history, item], f"Added {self._title(item)}")

    def _remove(self, place: int) -> None:
        item = self._history[place]
        self._take(self._history[:place] + self._history[place + 1 :], f"Removed {self._title(item)}")
        buttons = [element for element in self._listed.descendants() if isinstance(element, ui.button)]
        row = max(len(self._history) - place, 0)  # the row that follows, else the last one
        focus(buttons[min(row, len(buttons) - 1)] if buttons else self._item_finder.field)

    def _take(self, history: list[str], said: str, is_fresh: bool = False) -> None:
        """Show a history, and compute its lists; what is still computed for the one before ends."""
        self._stop()
        self._history = history
        self._said.text = f"{said}: {len(history):,} items, the latest first."
        if len(history) > HISTORY:
            self._said.text += f" The model reads these {HISTORY}."
        self._listed.clear()
        with self._listed:
            for place in list(reversed(range(len(history))))[:HISTORY]:
                with ui.element("li"):
                    title = self._title(history[place])
                    text("span", title)
                    button = ui.button(icon="close", on_click=partial(self._remove, place)).props("flat round dense")
                    button.props["aria-label"] = f"Remove {title}"
        for column in self._columns:
            column.start(history, is_fresh)
        self._counting = background_tasks.create(self._count(history, is_fresh))

    async def _count(self, history: list[str], is_fresh: bool) -> None:
        catalogue = self._catalogue
        gone = set(history)
        popular = islice((item for item in catalogue.popularity if item not in gone), K)
        self._popularity.show([named(item, catalogue) for item in popular], is_fresh)
        counted = await asyncio.to_thread(catalogue.counted, history, K)
        self._cooccurrence.show([named(item, catalogue) for item in counted], is_fresh)
        self._mark_held_out()

    def _show_held_out(self) -> None:
        self._is_revealed = True
        self._reveal.set_visibility(False)
        self._mark_held_out()

    def _mark_held_out(self) -> None:
        if not self._is_revealed:
            return
        item, places = self._catalogue.held_out[self._user], []
        for ranking in (*(column.ranking for column in self._columns), self._cooccurrence, self._popularity):
            rank = ranking.mark(item)
            places.append(f"{ranking.name}: {f'rank {rank}' if rank else f'not among {K}'}")
        self._held_out.text = f"Held out: {self._title(item)}. {'; '.join(places)}."

    def _stop(self) -> None:
        for column in self._columns:
            column.stop()
        if self._counting is not None:
            self._counting.cancel()


def _add_ranking(name: str) -> Ranking:
    with card(name):
        return Ranking(name)
