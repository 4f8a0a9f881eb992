import dataclasses
import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest

from convert.errors import InputError
from jaxprefix.config import Compute, HostsConfig
from jaxprefix.run import description
from jaxprefix.run.description import check_base, common_settings, config_of, describe_run, setting_of
from tests.runs import begin, check_resumed, run_config


def test_a_resumed_run_may_take_less_memory_but_no_other_batches(tmp_path):
    config = run_config(tmp_path)
    begin(config)
    moved = shutil.copy(config.data_filepath, tmp_path / "moved.jsonl")
    for changes in ({"compute": Compute(remat="block")}, {"mesh": "fsdp=2"}, {"data_filepath": Path(moved)}):
        check_resumed(dataclasses.replace(config, **changes))
    with pytest.raises(InputError, match="batch_size: was 4, now 2"):
        check_resumed(dataclasses.replace(config, batch_size=2))


def test_of_another_base_only_what_differs_is_told(tmp_path):
    config = run_config(tmp_path)
    begin(config, weights="a", n_layer="3")
    with pytest.raises(InputError) as error:
        check_resumed(config, weights="b", n_layer="3")
    assert str(error.value).split("\n  - ")[1:] == ["weights: was 'a', now 'b'"]


def test_the_flags_of_a_type_are_synonyms_on_resuming_too(tmp_path):
    config = run_config(tmp_path, bf16=True)
    begin(config)
    check_resumed(run_config(tmp_path, dtype="bfloat16"))
    with pytest.raises(InputError, match="dtype: was 'bfloat16', now 'float16'"):
        check_resumed(run_config(tmp_path, fp16=True))


def test_the_prefix_in_a_run_has_its_settings(tmp_path):
    config = run_config(tmp_path, suffix="！")
    begin(config)
    assert setting_of(config.run_dir / "prefix", "suffix") == setting_of(config.run_dir, "suffix") == "！"
    assert setting_of(tmp_path, "suffix") is setting_of(None, "suffix") is None


def test_a_run_within_another_has_its_own_settings(tmp_path):
    outer = run_config(tmp_path, suffix="！")
    inner = run_config(outer.run_dir, suffix="。")
    for config in (outer, inner):
        begin(config)
    assert setting_of(inner.run_dir, "suffix") == "。"


def test_a_number_that_was_damaged_differs(tmp_path):
    config = run_config(tmp_path)
    begin(config)
    description = config.run_dir / "config.json"
    description.write_text(description.read_text().replace('"n_epochs": 2', '"n_epochs": "two"'))
    with pytest.raises(InputError, match="n_epochs: was 'two', now 2"):
        check_resumed(config)


def test_a_run_may_be_renamed(tmp_path):
    config = run_config(tmp_path, filename_note="note")
    begin(config)
    config.run_dir.rename(tmp_path / "renamed")
    check_resumed(run_config(tmp_path, "renamed"))


def test_a_run_of_an_earlier_version_does_not_know_every_setting(tmp_path):
    config = run_config(tmp_path)
    begin(config, n_layer="3")
    check_resumed(config, n_layer="3", weights="a")


def test_an_encoder_to_start_from_may_be_gone_once_a_checkpoint_is_there(tmp_path):
    config = run_config(tmp_path, checkpoint_path=tmp_path / "earlier")
    begin(config)
    with pytest.raises(InputError, match=r"checkpoint_path: was '.*earlier', now None"):
        check_resumed(run_config(tmp_path))
    (config.run_dir / "checkpoints" / "4").mkdir(parents=True)
    check_resumed(run_config(tmp_path))
    begin(run_config(tmp_path, resume=True))
    assert setting_of(config.run_dir, "checkpoint_path") == str(tmp_path / "earlier"), "what the run began with"


@pytest.mark.parametrize("before", ["a run that began with none", "a converted state"])
def test_what_a_resumed_run_is_told_to_start_from_is_not_what_it_began_with(tmp_path, before):
    config = run_config(tmp_path, checkpoint_path=tmp_path / "later", resume=True)
    if before == "a run that began with none":
        begin(run_config(tmp_path))
    (config.run_dir / "checkpoints" / "4").mkdir(parents=True)
    check_resumed(config)
    begin(config)
    assert setting_of(config.run_dir, "data_sha256")
    assert setting_of(config.run_dir, "checkpoint_path") is None


def test_a_runs_settings_make_another_like_it(tmp_path, monkeypatch):
    compute = Compute(remat="block")
    config = run_config(tmp_path, checkpoint_path=tmp_path / "earlier", compute=compute, bf16=True)
    begin(dataclasses.replace(config, overwrite=True, hosts=HostsConfig(stall_minutes=5.0)))
    assert config_of(config.run_dir) == config
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_of("~/run") == config
    changed = config_of(str(config.run_dir), save_name="another", compute=Compute(), max_lr=1.0)
    assert changed == dataclasses.replace(config, save_name="another", compute=Compute(), max_lr=1.0)
    begin(dataclasses.replace(config, resume=True))
    assert not config_of(config.run_dir).resume


REQUIRED = {"data_sha256": "", "pretrained_model_dir": "m", "save_name": "a", "data_filepath": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "not a run, config.json is missing or damaged"),
        ({"data_sha256": "", "save_name": "a"}, "config.json: .*missing .*required"),
        (REQUIRED | {"compute": 3}, "config.json: .*argument after"),
        (REQUIRED | {"compute": {"x": 1}}, "config.json: .*unexpected keyword argument 'x'"),
        (REQUIRED | {"output_dir": 3}, "config.json: .*int"),
        (REQUIRED | {"seed": -1}, "config.json: train:\n  - --seed must not be negative, is -1"),
    ],
)
def test_settings_that_cannot_be_used_are_told(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        config_of(tmp_path)


def test_processes_compare_the_encoder_that_they_start_from(tmp_path):
    (tmp_path / "state.pt").write_text("an encoder")
    config = run_config(tmp_path, checkpoint_path=tmp_path / "state.pt")
    settings = common_settings(config, describe_run(config, {}))
    (tmp_path / "state.pt").write_text("another encoder")
    assert common_settings(config, describe_run(config, {})) != settings
    without = dataclasses.replace(config, checkpoint_path=None)
    assert common_settings(without, describe_run(without, {}))["checkpoint_path"] is None
    assert settings["checkpoint_path"] == "given"


def test_processes_may_have_the_same_things_in_other_places(tmp_path):
    config = run_config(tmp_path, checkpoint_path=tmp_path / "earlier")
    moved = shutil.copy(config.data_filepath, tmp_path / "moved.jsonl")
    places = {"data_filepath": Path(moved), "checkpoint_path": tmp_path / "later", "output_dir": tmp_path / "later"}
    other = dataclasses.replace(config, **places, pretrained_model_dir="elsewhere", revision="main")
    for path in (config.checkpoint_path, other.checkpoint_path):
        path.mkdir()
    settings, others = (common_settings(one, describe_run(one, {})) for one in (config, other))
    assert settings == others
    assert {"seed", "XLA_FLAGS", "JAX_PLATFORMS", "device"} <= settings.keys(), "programs must be the same, too"
    assert "checkpoint_sha256" not in settings, "of a folder"


def test_the_version_of_a_run_is_a_checksum_of_all_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(description, "__file__", str(tmp_path / "jaxprefix" / "run" / "description.py"))
    found = set()
    for package in ("", "convert", "jaxprefix", "jaxprefix/models"):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "a.py").write_text(package)
        found.add(describe_run(run_config(tmp_path), {})["versions"]["sources"])
    assert len(found) == 4


def test_a_run_says_which_version_trained_it(tmp_path):
    versions = describe_run(run_config(tmp_path), {})["versions"]
    assert versions["jaxprefix"] == importlib.metadata.version("jaxprefix")
    assert versions.keys() == {"jaxprefix", "sources", "jax", "jaxlib"}


def test_a_run_that_does_not_say_its_base_is_of_another(tmp_path):
    config = run_config(tmp_path)
    begin(config, n_layer="3")
    check_base(config.run_dir, {"n_layer": "3", "base_model": "renamed"})
    with pytest.raises(InputError, match="n_head: made for None, this base has 4"):
        check_base(config.run_dir, {"n_layer": "3", "n_head": "4"})


OTHERS = {
    "seed": 1,
    "suffix": "!",
    "max_seq_len": 32,
    "recipe": "rinna",
    "n_accum_steps": 2,
    "batch_size": 2,
    "train_data_size": 10,
    "dev_data_size": 3,
    "prefix_seq_len": 4,
    "prefix_input_dim": 4,
    "prefix_hidden_dim": 4,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_eps": 1e-4,
    "weight_decay": 0.5,
    "grad_clip": 0.5,
    "n_warmup_steps": 2,
    "max_lr": 1e-3,
    "min_lr": 1e-7,
    "dtype": "bfloat16",
    "skip_bad_lines": True,
    "packing": True,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_changes_the_result_may_not_change_on_resuming(tmp_path, name):
    config = run_config(tmp_path)
    begin(config)
    with pytest.raises(InputError, match=f"{name}: was"):
        check_resumed(dataclasses.replace(config, **{name: OTHERS[name]}))


FREE = {
    "save_log": False,
    "log_every_n_steps": 7,
    "checkpoint_every_n_steps": 7,
    "checkpoint_every_minutes": 7.0,
    "revision": "main",
    "hosts": HostsConfig(True),
    "n_training_steps": 10**6 + 1,
}


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_change_the_result_may_change_on_resuming(tmp_path, name):
    config = run_config(tmp_path, n_training_steps=10**6)
    begin(config)
    check_resumed(dataclasses.replace(config, **{name: FREE[name]}))


def test_another_version_goes_on_with_a_run(tmp_path, monkeypatch):
    config = run_config(tmp_path)
    begin(config)
    monkeypatch.setattr(description, "_versions", lambda: {"jax": "another"})
    check_resumed(config)


def test_other_data_under_the_same_name_is_noticed_on_resuming(tmp_path):
    config = run_config(tmp_path)
    begin(config)
    (tmp_path / "other.jsonl").write_text('{"text": "a"}')
    with pytest.raises(InputError, match="data_sha256: was"):
        check_resumed(dataclasses.replace(config, data_filepath=tmp_path / "other.jsonl"))


def test_the_prefix_in_a_run_has_its_settings_from_within_too(tmp_path, monkeypatch):
    config = run_config(tmp_path, suffix="！")
    begin(config)
    (config.run_dir / "prefix").mkdir()
    monkeypatch.chdir(config.run_dir / "prefix")
    assert setting_of(Path(), "suffix") == "！"
