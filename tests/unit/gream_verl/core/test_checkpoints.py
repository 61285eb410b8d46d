from gream_verl.core.checkpoints import drop_torn_checkpoints, newest_checkpoint


def test_a_torn_checkpoint_is_dropped_and_a_whole_one_kept(tmp_path):
    for step, state in ((10, '{"global_step": 10}'), (9, "{}"), (20, None), (30, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-notes").write_text("dear")
    assert newest_checkpoint(tmp_path).name == "checkpoint-30"
    drop_torn_checkpoints(tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-notes"]
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert newest_checkpoint(tmp_path / "absent") is None
