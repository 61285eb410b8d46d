import house
import pytest


def test_imports_go_down_only():
    assert house.climbing_imports() == []


def test_a_climbing_import_is_found(tmp_path, monkeypatch):
    room = tmp_path / "gream_verl" / "core"
    room.mkdir(parents=True)
    (tmp_path / "gream_verl" / "evaluation").mkdir()
    (room / "low.py").write_text("def late():\n    from gream_verl.evaluation import metrics\n")
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.climbing_imports() == ["gream_verl/core/low.py:2: gream_verl.core imports gream_verl.evaluation"]


@pytest.mark.parametrize(
    ("module", "room"), [("gream_verl.core.files", "gream_verl.core"), ("data_processing.rl", "data_processing")]
)
def test_the_room_of_a_module_is_its_folder(module, room):
    assert house.room_of(module) == room
