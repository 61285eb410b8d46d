from __future__ import annotations

import ast
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.sources import json_lines
from data_processing.sources.amazon import Id, Time
from data_processing.sources.common import RowChecks
from data_processing.sources.json_lines import read_json_lines
from gream_verl.core.errors import InputError

RECORD = msgspec.defstruct("Record", [("user", Id), ("time", Time)])
GOOD = {"user": "u", "text": 'so "good" }', "time": 100}
LINE = json.dumps(GOOD).encode()

odd_values = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 10), st.floats(), st.text(max_size=3),
    st.sampled_from(["7", "7.5", "nan", "1e400", 2**62, 10**400, [1], {"a": None}, "\U0001f3ac"]),
)  # fmt: skip
objects = st.dictionaries(st.sampled_from(["user", "time", "text", "other"]), odd_values).map(lambda odd: GOOD | odd)
odd_lines = st.sampled_from(
    [
        b"", b"  ", b"\r", b"\xff\xfe\x00", b"null", b"[1, 2]", b"7", b"{}", b"[" * 3000, b"{'user': {1, 2}}",
        b"{'user': 'u', 'time': 5, 'other': None}", b"{'user': 'half \\ud83c', 'time': 5}", b"{[]: 1}",
        b"__import__('os')", LINE + LINE, LINE + b"\r", b"  " + LINE + b" ", LINE[:-1], LINE + b",",
        LINE.replace(b'"u"', b'"\\ud83c"'), LINE.replace(b'"u"', b'"\xed\xa0\xbd"'), LINE.replace(b'"u"', b"7"),
        LINE.replace(b"100", b'"100"'), LINE.replace(b"100", b"NaN"), LINE.replace(b"100", b"1e2"),
    ]
)  # fmt: skip
lines = st.one_of(st.just(LINE), objects.map(lambda value: json.dumps(value).encode()), odd_lines)


def plainly(content: bytes) -> tuple[list[tuple[str, float]], list[int]]:
    """Return the good rows and the numbers of the bad lines, with the json module."""
    rows, bad = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=float)
            user, time = value["user"], value["time"]
        except (ValueError, TypeError, KeyError, RecursionError):
            try:
                value = ast.literal_eval(line.decode().strip())
                user, time = value["user"], value["time"]
            except (ValueError, TypeError, KeyError, SyntaxError, MemoryError, RecursionError):
                user = time = None
        try:
            user.encode()
            time = float(None if isinstance(time, bool) else time)
        except (AttributeError, ValueError, TypeError, OverflowError):
            user = None
        if user and b"NaN" not in line and b"Infinity" not in line and abs(time) < 2**62:
            rows.append((user, time))
        else:
            bad.append(number)
    return rows, bad


def read(content: bytes, bad_rows: float = 1.0) -> tuple[list[tuple[Any, ...]], RowChecks]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "R.json.gz"
        path.write_bytes(content)
        checks = RowChecks(path, bad_rows)
        return [(row.user, row.time) for row in read_json_lines(path, checks, "user and time", RECORD)], checks


@settings(max_examples=60)
@given(st.lists(lines, max_size=12), st.booleans(), st.booleans())
def test_dirty_files_are_read_as_the_json_module_reads_them(content: list[bytes], packed: bool, ended: bool) -> None:
    whole = b"\n".join([LINE, *content]) + b"\n" * ended
    expected, bad = plainly(whole)
    rows, checks = read(gzip.compress(whole) if packed else whole)
    assert rows == expected
    assert [reject["row"] for reject in checks.rejects] == bad
    assert checks.rows == len(expected) + len(bad)


@settings(max_examples=40)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.sampled_from([0.0, 0.2, 0.5]))
def test_too_many_bad_lines_stop_at_the_next_check(good: list[bool], share: float) -> None:
    expected = None
    for number in range(1, len(good) + 1):
        bad = good[:number].count(False)
        if bad > share * number and (number % 4 == 0 or number == len(good)):
            expected = f"{bad} of {number} rows cannot be used, the first is row {good.index(False) + 1} "
            break
    content = b"".join((LINE if line else b"oops") + b"\n" for line in good)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "CHECK_EVERY", 4)
        if expected is None:
            assert len(read(content, share)[0]) == sum(good)
        else:
            with pytest.raises(InputError, match=expected):
                read(content, share)


def test_several_gzip_members_are_one_file() -> None:
    content = gzip.compress(LINE + b"\n" + LINE[:10]) + gzip.compress(LINE[10:] + b"\n" + LINE)
    rows, checks = read(content)
    assert (len(rows), checks.rows, checks.skipped) == (3, 3, {})


def test_a_torn_gzip_file_and_an_endless_line_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(b"\n".join(LINE.replace(b"100", b"%d" % row) for row in range(2000)))
    for torn in (packed[:-200], packed[:60] + b"garbage" * 20):
        with pytest.raises(InputError, match=r"R\.json\.gz: the gzip file is cut short or damaged .*download it again"):
            read(torn)
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 1000)
    with pytest.raises(InputError, match=r"R\.json\.gz: a line exceeds .* expected one object per line"):
        read(b"[" + b",".join([LINE] * 40) + b"]")
