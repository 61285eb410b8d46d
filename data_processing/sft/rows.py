"""The rows of a SFT data set, as the trainer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import polars as pl

from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file


class Row(NamedTuple):
    """One training example.

    Attributes:
        task: Name of its task.
        system: The system turn, "" when there is none.
        user: What is asked.
        assistant: What is answered.
    """

    task: str
    system: str
    user: str
    assistant: str


def read_rows(file: Path) -> pl.DataFrame:
    """Read a whole file: the columns of :class:`Row`, in the order of the file.

    Raises:
        InputError: When the file is missing, torn, not a SFT file, or has a row that is not a question and an answer,
            which LLaMA-Factory would leave out without a word.
    """
    require_file(file, "make it with `gream data mix`")
    turn, value = pl.col("conversations").list, pl.element().struct.field
    try:
        rows = pl.read_parquet(file, columns=["conversations", "system", "task"]).select(
            "task",
            pl.col("system").fill_null(""),
            turn.get(0, null_on_oob=True).struct.field("value").alias("user"),
            turn.get(1, null_on_oob=True).struct.field("value").alias("assistant"),
            turn.eval(value("from")).list.join(" ").alias("speakers"),
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: not a whole SFT file ({reason}); make it anew with `gream data mix`") from error
    if rows.is_empty():
        raise InputError(f"{file}: has no rows; make it anew with `gream data mix`")
    said = (pl.col("speakers") == "human gpt") & (pl.col("user") != "") & (pl.col("assistant") != "")
    whole = rows.select((said & pl.col("task").is_not_null()).fill_null(False))["speakers"]
    if len(wrong := whole.not_().arg_true()):
        raise InputError(
            f"{file}: row {wrong[0]}: expected a task, and `conversations` of one text from human and one from gpt; "
            "make it anew with `gream data mix`"
        )
    return rows.drop("speakers")
