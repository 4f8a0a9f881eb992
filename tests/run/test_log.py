"""The files that a run writes about itself."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convert.errors import InputError, RunError
from jaxprefix.run.log import RunLog, TensorBoard, check_metrics
from tests.runs import printed_by


def test_scalars_do_not_wait_for_tensorflow(tmp_path):
    """Where TensorFlow is installed, TensorBoard's own writer imports it: seconds, and whatever is broken there."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise RuntimeError('numpy is another')")
    program = f"""
import sys
from pathlib import Path
from jaxprefix.run.log import TensorBoard
board = TensorBoard(Path({str(tmp_path / "board")!r}), 0)
board.scalars(1, {{"loss/train": 0.5}})
print("tensorflow" in sys.modules)
"""
    assert printed_by(program, PYTHONPATH=str(tmp_path)) == "False\n"
    (scalar,) = EventAccumulator(str(tmp_path / "board")).Reload().Scalars("loss/train")
    assert (scalar.step, scalar.value) == (1, 0.5)


def test_a_full_disk_does_not_hide_the_error_that_ended_the_run(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with RunLog(tmp_path, n_updates=1, from_step=0, to_evaluate=False, quiet=True) as log:
        pass
    log.ended_by(RunError("update 2: the loss is nan"))


def test_each_opening_has_a_file_of_its_own(tmp_path):
    for step in range(1, 4):
        board = TensorBoard(tmp_path, step - 1)
        board.scalars(step, {"loss/train": step})
        board.close()
    assert len([*tmp_path.iterdir()]) == 3
    scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/train")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(1, 1), (2, 2), (3, 3)]


def test_scalars_are_there_while_the_run_goes_on(tmp_path):
    board = TensorBoard(tmp_path, 0)
    board.scalars(1, {"loss/train": 0.5})
    (scalar,) = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/train")
    board.close()
    assert (scalar.step, scalar.value) == (1, 0.5)


def test_a_step_that_is_no_number_is_damage(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"split": "train", "step": "4"}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl: line 1 is damaged"):
        check_metrics(tmp_path)
