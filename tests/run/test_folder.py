import dataclasses
import re
from pathlib import Path

import pytest

from convert.errors import InputError
from jaxprefix.run.description import describe_run
from jaxprefix.run.folder import check_run_folder, open_run_folder
from jaxprefix.train import train
from tests.runs import begin, check_resumed, run_config


def test_a_file_in_the_place_of_the_run(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(InputError, match=re.escape("run: cannot be written (File exists)")):
        open_run_folder(run_config(tmp_path), {})


def test_a_converted_state_can_be_resumed_though_its_first_run_was_killed_early(tmp_path):
    config = run_config(tmp_path, resume=True)
    (config.run_dir / "checkpoints" / "9").mkdir(parents=True)
    (config.run_dir / "config.json.tmp").write_text("{")
    open_run_folder(config, {})
    assert {path.name for path in config.run_dir.iterdir()} == {"checkpoints", "config.json"}


def test_what_to_do_with_a_folder_that_is_not_empty(tmp_path):
    config = run_config(tmp_path)

    def refused_with(advice):
        with pytest.raises(InputError, match=f"run: is not empty; {advice}$"):
            check_run_folder(config, {})

    (config.run_dir / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir(parents=True)
    refused_with("use another --save_name")
    with pytest.raises(InputError, match=r"no run to resume, config.json is missing or damaged"):
        check_resumed(config)
    (config.run_dir / "checkpoints" / "9").mkdir()
    refused_with("use --resume or another --save_name")
    begin(dataclasses.replace(config, resume=True))
    refused_with("use --resume, --overwrite, or another --save_name")


def test_what_a_file_manager_leaves_is_no_content_of_a_run(tmp_path):
    config = run_config(tmp_path)
    (config.run_dir / "checkpoints" / "9").mkdir(parents=True)
    (config.run_dir / ".DS_Store").touch()
    begin(dataclasses.replace(config, resume=True))  # after jaxprefix convert
    begin(run_config(tmp_path / "run" / "checkpoints", "9"))


def test_without_checkpoints_there_is_a_log(tmp_path):
    config = run_config(tmp_path, save_model=False, n_training_steps=1)
    train(config)
    logs = {"metrics.jsonl", "log.txt", "tensorboard"}
    assert {path.name for path in config.run_dir.iterdir()} == {"config.json", *logs}


def test_a_working_folder_whose_name_is_not_utf8_takes_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("r\udce9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    config = run_config(Path("runs"))
    with pytest.raises(InputError, match=r"^runs/run: lies in '.*r\\udce9', which is not UTF-8; no checkpoint can be"):
        check_run_folder(config, {})


def test_damaged_metrics_are_nothing_to_a_run_that_logs_no_more(tmp_path):
    config = run_config(tmp_path)
    begin(config)
    (config.run_dir / "metrics.jsonl").write_text("damaged\n{}\n")
    resumed = dataclasses.replace(config, resume=True, save_log=False)
    check_run_folder(resumed, describe_run(resumed, {}))
    resumed = dataclasses.replace(config, resume=True)
    with pytest.raises(InputError, match=r"metrics.jsonl: line 1 is damaged"):
        check_run_folder(resumed, describe_run(resumed, {}))
