from __future__ import annotations

import ast
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_processing.sources import json_lines, tables
from data_processing.sources.amazon import RELEASES, _reviews
from data_processing.sources.tables import INTERACTIONS, RowChecks
from gream_verl.core.errors import InputError

GOOD = {"overall": 5.0, "reviewerID": "u", "asin": "i", "reviewText": 'so "good" }\n{ it is', "unixReviewTime": 100}
LINE = json.dumps(GOOD)

odd_values = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 10), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3),
    st.sampled_from(["", " ", "7", "7.5", "nan", "1e400", "\u00e9", "\U0001f3ac", 10**400, [1], {"a": None}, [["b"]]]),
)  # fmt: skip
odd_objects = st.dictionaries(st.sampled_from([*GOOD, "other"]), odd_values).map(lambda changed: GOOD | changed)
objects = st.one_of(odd_objects, st.dictionaries(st.sampled_from(list(GOOD)), odd_values))
odd_lines = st.sampled_from(
    [
        b"", b"  ", b"\r", b"\xff\xfe\x00", b"null", b"[1, 2]", b"7", b"{}", b"[" * 20_000, b"{'asin': 'i'}",
        b"{'reviewerID': 'u', 'asin': 'i', 'unixReviewTime': 5, 'overall': None}", b"{'asin': {1, 2}}",
        LINE.encode() * 2, LINE.encode() + b" " + LINE.encode(), LINE.encode() + b"\r", b"  " + LINE.encode() + b" ",
        b"\xef\xbb\xbf" + LINE.encode(), LINE.encode().replace(b"so", b"s\xff"), LINE.encode().replace(b"so", b"\t"),
        LINE.encode().replace(b"so", b"\xed\xa0\xbd"), LINE.encode().replace(b"so", b"\\ud83c"),
        LINE.encode().replace(b"so", b"\\udc00"), LINE.encode().replace(b"so", b"\\ud83c\\udfac"),
        LINE.encode().replace(b"so", b"\\\\ud83c"), LINE.encode().replace(b"so", b"\\x"),
        LINE.encode().replace(b'"u"', b'"\\ud83c"'), LINE.encode().replace(b'"u"', b'"u", "reviewerID": 7'),
        LINE.encode().replace(b'"u"', b'7, "reviewerID": "v"'), LINE.encode().replace(b'"u"', b'"u", "asin": "j"'),
        LINE.encode().replace(b"100", b"NaN"), LINE.encode().replace(b"100", b'"100"'), LINE.encode()[:-1],
        LINE.encode().replace(b"100", b"1e2"), LINE.encode().replace(b"100", b"0100"), LINE.encode() + b",",
        LINE.encode().replace(b"100", b"-0.0"), LINE.encode().replace(b"100", b"4611686018427387904"),
        LINE.encode().replace(b"5.0", b"Infinity"), LINE.encode().replace(b"5.0", b"1e400"),
        LINE.encode().replace(b'"so', b'{"asin": ["so').replace(b"it is", b""), LINE.encode().replace(b", ", b",\n"),
        LINE.encode().replace(b"5.0", b'{"a": [{"b": 1}\n{"c": 2}]}'), b'{"x": [{}', b'{}]}', b"{'asin': '\\ud83c'}",
        b"{'reviewerID': 'u', 'asin': 'half \\U0000d83c', 'unixReviewTime': 5}", b"__import__('os')", b"{[]: 1}",
    ]
)  # fmt: skip
lines = st.one_of(
    st.just(LINE.encode()),
    objects.map(lambda value: json.dumps(value).encode()),
    objects.map(lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()),
    odd_lines,
    st.binary(max_size=20),
)


def slowly(content: bytes) -> tuple[list[tuple[Any, ...]], list[tuple[int, str, str]]]:
    """Return rows and rejects of a file of reviews of 2018, read line by line as the documentation says."""
    rows, rejects = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig")
            try:
                value = json.loads(text)
            except ValueError:
                value = ast.literal_eval(text.strip())
            if "\\ud" in text.lower() or "\\u0000d" in text.lower():
                json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = None
        if not isinstance(value, dict):
            rejects.append((number, "not an object", line.decode("utf-8", "replace")[:200]))
            continue
        user, item = value.get("reviewerID"), value.get("asin")
        time, rating = number_of(value.get("unixReviewTime")), number_of(value.get("overall"))
        if isinstance(user, str) and user and isinstance(item, str) and item and time is not None:
            rows.append((user, item, time, rating))
        else:
            rejects.append((number, "no user, item or time", str(value)[:200]))
    return rows, rejects


def number_of(value: Any) -> float | None:
    try:
        number = None if isinstance(value, bool | list | dict) or value is None else float(value)
    except (ValueError, OverflowError):
        return None
    return number if number is not None and abs(number) < 2**62 else None


def read(content: bytes, block: int, bad_rows: float = 1.0) -> tuple[list[tuple[Any, ...]], RowChecks]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "BLOCK", block)
        (path := Path(folder) / "R.json.gz").write_bytes(content)
        checks = RowChecks(path.name, bad_rows)
        frames = list(_reviews(path, RELEASES[2018], checks))
    assert all(frame.schema == pl.Schema({**INTERACTIONS, "timestamp": pl.Float64()}) for frame in frames)
    return [row for frame in frames for row in frame.iter_rows()], checks


@given(st.lists(lines, max_size=12), st.integers(1, 400), st.booleans(), st.booleans())
@example([b"{}" + LINE.encode() * 2, b"", LINE.encode()], 4000, False, False)
@example(
    [LINE.encode(), LINE.encode().replace(b"5.0", b'{"a": [{"b": 1}\n{"c": 2}]}'), LINE.encode() * 2], 999, True, True
)
def test_dirty_files_are_read_as_line_by_line(content: list[bytes], block: int, packed: bool, ended: bool) -> None:
    # One good line, so that the file is not empty.
    whole = b"\n".join([LINE.encode(), *content]) + b"\n" * ended
    rows, rejects = slowly(whole)
    for size in (block, 1 << 20):
        read_rows, checks = read(gzip.compress(whole) if packed else whole, size)
        assert str(read_rows) == str(rows)  # -0.0, too
        assert [(r["row"], r["reason"], r["text"]) for r in checks.rejects] == rejects
        assert checks.rows == len(rows) + len(rejects)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 400), st.sampled_from([0.0, 0.2, 0.5]))
def test_too_many_bad_lines_stop_where_line_by_line_would(good: list[bool], block: int, share: float) -> None:
    expected = None
    for number in range(1, len(good) + 1):
        bad = good[:number].count(False)
        if bad > share * number and (number % 4 == 0 or number == len(good)):
            expected = f"{bad} of {number} rows cannot be used, the first is row {good.index(False) + 1} "
            break
    content = b"".join((LINE if line else "oops").encode() + b"\n" for line in good)
    with pytest.MonkeyPatch.context() as patch:
        for module in (json_lines, tables):
            patch.setattr(module, "CHECK_EVERY", 4)
        if expected is None:
            assert len(read(content, block, share)[0]) == sum(good)
        else:
            with pytest.raises(InputError, match=expected):
                read(content, block, share)


def test_several_gzip_members_and_lines_longer_than_a_block_are_read() -> None:
    long = json.dumps(GOOD | {"reviewText": "x" * 3000})
    content = gzip.compress(f"{LINE}\n{long[:1000]}".encode()) + gzip.compress(f"{long[1000:]}\n{LINE}".encode())
    rows, checks = read(content, 64)
    assert (len(rows), checks.rows, checks.skipped) == (3, 3, {})


def test_a_line_without_end_is_no_reason_to_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 1000)
    with pytest.raises(InputError, match=r"R\.json\.gz: a line is longer than .* expected one object a line"):
        read(b"[" + b",".join([LINE.encode()] * 20) + b"]", 64)


def test_good_lines_do_not_make_python_objects_of_what_is_not_needed() -> None:
    content = (LINE + "\n").encode() * 300
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "_one_by_one", None)
        assert len(read(content, 1000)[0]) == 300
