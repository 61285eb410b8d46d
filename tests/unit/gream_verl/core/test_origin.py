"""Files that have changed since others were made from them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gream_verl.core.errors import InputError
from gream_verl.core.origin import KEY, check_model, check_origin, mark, origin_of
from gream_verl.core.semantic_ids import ItemIndex

OLD, NEW = {"1": ("<|a_1|>",)}, {"2": ("<|a_2|>",)}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A parquet file made from interactions, an index, and the lack of a split."""
    sources = [tmp_path / name for name in ("D.inter.json", "D.split.json", "D.index.json")]
    sources[0].write_text("{}\n")
    ItemIndex(OLD).save(sources[2])
    schema = pa.schema({"row": pa.int64()}).with_metadata(origin_of(*sources))
    pq.write_table(pa.table({"row": [1]}, schema=schema), tmp_path / "D-rl.parquet")
    return tmp_path / "D-rl.parquet"


def test_the_same_sources_and_a_grown_index_are_accepted(made: Path) -> None:
    check_origin(made, "again")
    ItemIndex(OLD | NEW).save(made.parent / "D.index.json")
    check_origin(made, "again")
    alone = made.parent / "elsewhere" / made.name
    alone.parent.mkdir()
    alone.write_bytes(made.read_bytes())
    check_origin(alone, "again")  # its sources are not there


@pytest.mark.parametrize("name", ["D.inter.json", "D.split.json", "D.index.json"])
def test_another_source_is_refused(made: Path, name: str) -> None:
    path = made.parent / name
    ItemIndex(NEW).save(path) if "index" in name else path.write_text("{ }\n")
    with pytest.raises(InputError, match=f"D-rl.parquet: was made from another {name} than the one next to it; again"):
        check_origin(made, "again")


def test_a_model_is_refused_with_another_index_than_its_own(tmp_path: Path) -> None:
    index = tmp_path / "D.index.json"
    ItemIndex(OLD).save(index)
    (tmp_path / "config.json").write_text(json.dumps({KEY: mark(index)}))
    check_model(tmp_path, index)
    ItemIndex(OLD | NEW).save(index)
    check_model(tmp_path, index)
    ItemIndex(NEW).save(index)
    with pytest.raises(InputError, match="another index"):
        check_model(tmp_path, index)
    (tmp_path / "config.json").write_text("{}")  # another project's model says nothing
    check_model(tmp_path, index)
