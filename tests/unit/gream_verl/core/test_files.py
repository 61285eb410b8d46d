import json
import os

import pytest

from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, read_json, require_file, write_json


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "table.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError, match="halfway"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("halfway")
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_missing_parent_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", ["é"])
    assert (tmp_path / "a" / "b" / "c.json").read_text(encoding="utf-8") == '["é"]\n'


def test_a_file_of_a_similar_name_is_suggested(tmp_path):
    (tmp_path / "Beauty.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"no such file; did you mean Beauty\.index\.json\? Else build it$"):
        require_file(tmp_path / "beauty.index.jsn", "build it")
    with pytest.raises(InputError, match=r"no such file; build it$"):
        require_file(tmp_path / "x", "build it")
    with pytest.raises(InputError, match=r"no such file; build it$"):
        require_file(tmp_path / "nowhere" / "x", "build it")


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_json(tmp_path / "file" / "x.json", 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path):
    path = tmp_path / "table.json"
    write_json(path, "old")
    with pytest.raises(InputError, match="No space left"), atomic_path(path), open("/dev/full", "w") as full:
        full.write("x" * 10_000)
    assert json.loads(path.read_text()) == "old"


@pytest.mark.parametrize("place", ["/sys/none.json", "/proc/none/such/x.json"])
def test_a_place_that_takes_no_files_is_one_sentence(place):
    with pytest.raises(InputError, match="cannot be written"):
        write_json(place, 1)


def test_an_error_about_another_file_is_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "out.json"):
        (tmp_path / "absent").read_text()
