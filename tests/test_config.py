"""Settings that cannot be meant, each with what is said of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from convert.errors import InputError
from jaxprefix.config import CheckConfig, Compute, ConvertConfig, HostsConfig, TrainConfig
from jaxprefix.hub import resolve_folder
from jaxprefix.inference_config import DecodeConfig, EvaluateConfig, GenerateConfig
from jaxprefix.machine.user_cache import cache_folder
from jaxprefix.models.config import read_model_config
from jaxprefix.prefix import load_prefix, save_prefix
from jaxprefix.tokenizer import load_tokenizer
from tests.arrays import random_prefix
from tests.base_folders import GOLDEN_BASE
from tests.runs import run_config
from torch_ref.config import generate_parser, train_parser

NAMES = "--save_name must be a folder name and --filename_note must not contain /; together they give"
MESH = "--mesh must be axis=size,… with axes from data, fsdp, tensor; found"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_epochs": 0}, "--n_epochs must be positive, is 0"),
        ({"max_lr": float("nan")}, "--max_lr must be positive, is nan"),
        ({"max_lr": float("inf")}, "--max_lr must be finite"),
        ({"grad_clip": -1.0}, "--grad_clip must not be negative, is -1.0"),
        ({"adam_beta2": 1.0}, "--adam_beta2 must be at least 0 and below 1, is 1.0"),
        ({"max_lr": 1e-7}, "--min_lr 1e-06 is above --max_lr 1e-07"),
        ({"seed": 2**32}, "--seed must be below 4294967296, is 4294967296"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
        ({"dtype": "float16", "bf16": True}, "--dtype float16 contradicts --bf16"),
        ({"compute": Compute(attention="cudnn")}, "--attention cudnn needs --dtype bfloat16 or float16"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
        ({"resume": True, "save_model": False}, "--resume needs checkpoints, --no_save_model saves none"),
        ({"save_name": ".."}, f"{NAMES} '..'"),
        ({"filename_note": "a/b"}, f"{NAMES} 'run.a/b'"),
        ({"mesh": "data=2,rows=2"}, f"{MESH} 'data=2,rows=2'"),
        ({"dtype": "bfloat16", "fp16": True}, "--dtype bfloat16 contradicts --fp16"),
        ({"mesh": ""}, f"{MESH} ''"),
        ({"mesh": "data=0"}, f"{MESH} 'data=0'"),
        ({"mesh": "data=²"}, f"{MESH} 'data=²'"),
    ],
)
def test_settings_of_train_that_cannot_be_meant(changes, message):
    with pytest.raises(InputError) as error:
        run_config(Path(), **changes)
    assert str(error.value) == f"train:\n  - {message}"


def test_a_check_names_itself():
    with pytest.raises(InputError, match=r"^check:\n  - --batch_size must be positive, is 0$"):
        CheckConfig("base", batch_size=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_output_len": 0}, "--max_output_len must be positive, is 0"),
        ({"top_p": 1.5}, "--top_p must be between 0 and 1, is 1.5"),
        ({"top_k": -1}, "--top_k must not be negative, is -1"),
        ({"temperature": 0.0}, "--temperature must be finite and at least 1e-06, is 0.0"),
    ],
)
def test_settings_of_decoding_that_cannot_be_meant(changes, message):
    with pytest.raises(InputError) as error:
        DecodeConfig(**changes)
    assert str(error.value) == f"decoding:\n  - {message}"


def given(config, name, value):
    """Settings with a value that users may give: in tests, beartype would refuse it first."""
    config = dataclasses.replace(config)
    object.__setattr__(config, name, value)
    config.__post_init__()
    return config


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        (DecodeConfig(), "decode_method", "beam", "--decode_method must be one of nucleus, sample, greedy; is 'beam'"),
        (run_config(Path()), "model_type", "bert", "--model_type must be one of gpt-neox, gpt; is 'bert'"),
        (DecodeConfig(), "recipe", "beam", "--recipe must be one of default, rinna; is 'beam'"),
        (DecodeConfig(), "top_k", 5.0, "--top_k must be of type int, is 5.0"),
        (DecodeConfig(), "top_p", np.zeros(2), "--top_p must be of type float, is array([0., 0.])"),
        (Compute(), "remat", "full", "--remat must be one of elementwise, block; is 'full'"),
        (run_config(Path()), "mesh", {"fsdp": 8}, "--mesh must be of type str | None, is {'fsdp': 8}"),
        (run_config(Path()), "batch_size", 2.5, "--batch_size must be of type int, is 2.5"),
        (HostsConfig(), "num_processes", "2", "--num_processes must be of type int | None, is '2'"),
        (ConvertConfig(Path(), Path()), "revision", 3, "--revision must be of type str | None, is 3"),
        (EvaluateConfig("base"), "n_samples", None, "--n_samples must be of type int, is None"),
        (GenerateConfig("base", prompt=["a"]), "prompt", ["a", 3], "--prompt must be of type list[str], is ['a', 3]"),
    ],
)
def test_types_that_python_does_not_check(config, name, value, message):
    with pytest.raises(InputError) as error:
        given(config, name, value)
    assert str(error.value).split("\n  - ")[1:] == [message]


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (run_config(Path()), "suffix", "\udce9"),
        (run_config(Path()), "save_name", "r\udce9"),
        (run_config(Path()), "output_dir", Path("r\udce9")),
        (run_config(Path()), "data_filepath", Path("d\udce9.jsonl")),
        (ConvertConfig(Path(), Path()), "source", Path("s\udce9")),
        (EvaluateConfig("base"), "suffix", "\udce9"),
        (EvaluateConfig("base"), "pretrained_model_dir", "b\udce9"),
    ],
)
def test_bytes_of_a_shell_that_are_not_utf8_are_refused(config, name, value):
    with pytest.raises(InputError) as error:
        dataclasses.replace(config, **{name: value})
    assert str(error.value).split("\n  - ")[1:] == [f"--{name} must be UTF-8, is {str(value)!r}"]


@pytest.mark.parametrize("name", ["output_dir", "data_filepath", "checkpoint_path"])
def test_a_bucket_is_no_path(name):
    with pytest.raises(InputError) as error:
        given(run_config(Path()), name, "gs://bucket/runs")
    assert str(error.value) == f"train:\n  - --{name} must be a path on this machine, is 'gs://bucket/runs'"


def test_a_colon_may_stand_in_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs:").mkdir()
    assert given(run_config(Path()), "output_dir", "c:/runs").output_dir == Path("c:/runs")
    assert given(run_config(Path()), "output_dir", "runs:/of/may").output_dir == Path("runs:/of/may")


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    """Of --output_dir=~/runs, a shell makes none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given(run_config(Path()), "output_dir", "~/runs").output_dir == tmp_path / "runs"
    assert given(run_config(Path()), "data_filepath", "~nobody_here/data").data_filepath == Path("~nobody_here/data")
    for base in ("~/base", Path("~/base")):
        assert given(run_config(Path()), "pretrained_model_dir", base).pretrained_model_dir == str(tmp_path / "base")
    (tmp_path / "base").symlink_to(GOLDEN_BASE)
    assert resolve_folder("~/base") == tmp_path / "base"
    config, tokenizer = read_model_config(GOLDEN_BASE), load_tokenizer(GOLDEN_BASE)
    save_prefix("~/prefix", random_prefix(config), config, tokenizer)
    assert (tmp_path / "prefix").is_dir()
    assert load_prefix("~/prefix", config, tokenizer).shape[0] == config.n_layer


def test_caches_need_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/a"))
    assert cache_folder() == Path("/home/a/.cache/jaxprefix")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InputError, match="there is no home folder for caches; set XDG_CACHE_HOME to a folder"):
        cache_folder()


def test_a_path_may_be_a_str():
    assert given(run_config(Path()), "data_filepath", "data.jsonl").data_filepath == Path("data.jsonl")


def test_a_base_model_may_be_a_path():
    assert given(GenerateConfig("base"), "pretrained_model_dir", Path("base")).pretrained_model_dir == "base"


def test_a_copy_of_settings_may_have_another_dtype(tmp_path):
    config = run_config(tmp_path, bf16=True)
    assert config.dtype == "bfloat16"
    assert dataclasses.replace(config, dtype="float32").dtype == "float32"
    assert dataclasses.replace(config, fp16=True, dtype="float32").dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": True}, "--compare needs --prefix_checkpoint_path"),
        ({"prompt": ["a"], "prompt_file": Path("prompts.txt")}, "--prompt and --prompt_file exclude each other"),
        ({"batch_size": 0}, "--batch_size must be positive, is 0"),
    ],
)
def test_settings_of_generate_that_cannot_be_meant(changes, message):
    with pytest.raises(InputError) as error:
        GenerateConfig("base", **changes)
    assert str(error.value) == f"generate:\n  - {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be positive, is 0"),
        ({"max_seq_len": 0}, "--max_seq_len must be positive, is 0"),
        ({"n_samples": -1}, "--n_samples must not be negative, is -1"),
        ({"seed": -1}, "--seed must be at least 0 and below 4294967296, is -1"),
        ({"n_samples": 0}, "nothing to measure: neither --data_filepath nor --n_samples"),
        ({"suffix": " "}, "--suffix is blank, so there is no suffix rate; --n_samples 0 skips it"),
    ],
)
def test_settings_of_evaluate_that_cannot_be_meant(changes, message):
    with pytest.raises(InputError) as error:
        EvaluateConfig("base", **changes)
    assert str(error.value) == f"evaluate:\n  - {message}"


POSITIVE = [
    "prefix_seq_len",
    "prefix_input_dim",
    "max_seq_len",
    "train_data_size",
    "dev_data_size",
    "batch_size",
    "n_accum_steps",
    "n_training_steps",
    "n_epochs",
    "log_every_n_steps",
    "checkpoint_every_n_steps",
    "checkpoint_every_minutes",
    "max_lr",
    "adam_eps",
]


NOT_NEGATIVE = ["prefix_hidden_dim", "n_warmup_steps", "min_lr", "weight_decay", "grad_clip", "seed"]


def test_no_number_of_training_is_left_out():
    numbers = {field.name for field in dataclasses.fields(TrainConfig) if field.type in (int, float)}
    assert numbers == {*POSITIVE, *NOT_NEGATIVE, "adam_beta1", "adam_beta2"}


@pytest.mark.parametrize("name", POSITIVE + NOT_NEGATIVE)
def test_every_setting_has_its_bounds(name):
    kind = type(getattr(run_config(Path()), name))
    value = kind(0 if name in POSITIVE else -1)
    with pytest.raises(InputError, match=f"--{name} must "):
        run_config(Path(), **{name: value})


@pytest.mark.parametrize("name", ["max_lr", "min_lr", "weight_decay", "grad_clip", "adam_eps"])
def test_no_setting_is_infinite(name):
    with pytest.raises(InputError, match=f"--{name} must be finite"):
        run_config(Path(), **{name: float("inf")})


@pytest.mark.parametrize("name", ["min_lr", "weight_decay", "grad_clip"])
def test_nan_is_never_in_range(name):
    with pytest.raises(InputError, match=f"--{name} must not be negative, is nan"):
        run_config(Path(), **{name: float("nan")})


def test_a_revision_is_of_a_base_model():
    assert ConvertConfig(Path(), Path(), "user/model", "v1").revision == "v1"
    with pytest.raises(InputError, match="--revision belongs to --pretrained_model_dir, which is not given"):
        ConvertConfig(Path(), Path(), revision="v1")


def test_what_has_no_effect_may_be_anything():
    assert run_config(Path(), recipe="rinna", max_lr=1e-7).min_lr == 1e-6, "rinna ignores it"
    assert EvaluateConfig("base", data_filepath=Path("a"), n_samples=0, suffix="").suffix == ""


def test_numbers_may_be_numpys():
    config = given(run_config(Path()), "batch_size", np.int64(5))
    assert (config.batch_size, type(config.batch_size)) == (5, int)


@pytest.mark.parametrize("config", [GenerateConfig, EvaluateConfig])
def test_a_mesh_of_generating_and_evaluating_must_be_one(config):
    with pytest.raises(InputError) as error:
        config("base", mesh="data=2,rows=2")
    assert str(error.value).split("\n  - ")[1:] == [f"{MESH} 'data=2,rows=2'"]


@pytest.mark.parametrize("temperature", [float("inf"), float("nan")])
def test_a_temperature_is_finite(temperature):
    with pytest.raises(InputError, match="--temperature must be finite"):
        DecodeConfig(temperature=temperature)


def test_a_seed_of_sampling_has_32_bits():
    with pytest.raises(InputError, match=f"--seed must be at least 0 and below {2**32}, is {2**32}"):
        GenerateConfig("base", seed=2**32)


def test_a_name_is_no_path():
    with pytest.raises(InputError) as error:
        run_config(Path(), name="a/b")
    assert str(error.value) == f"train:\n  - {NAMES} 'a/b'"


def test_a_suffix_may_be_a_tilde():
    assert run_config(Path(), suffix="~").suffix == "~"


def test_flags_of_both_sides_have_the_same_defaults():
    """But for what is saved: the original saves nothing unless told."""
    needed = {"pretrained_model_dir": "a", "data_filepath": "b", "save_name": "c"}
    theirs = vars(train_parser().parse_args([part for name, value in needed.items() for part in (f"--{name}", value)]))
    ours = vars(TrainConfig(**needed | {"data_filepath": Path("b")}))
    shared = theirs.keys() & ours.keys() - {"model_type", "data_filepath", "save_model", "save_log"}
    assert {"n_epochs", "max_lr", "dev_data_size", "adam_beta2", "batch_size"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_flags_of_generating_have_the_same_defaults():
    theirs = vars(generate_parser().parse_args(["--pretrained_model_dir", "a"]))
    ours = vars(config := GenerateConfig("a")) | vars(config.decode)
    shared = theirs.keys() & ours.keys() - {"model_type", "prefix_seq_len"}
    assert {"max_output_len", "decode_method", "top_p", "top_k"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_evaluate_samples_as_the_readme_says():
    config = EvaluateConfig("a")
    assert (config.n_samples, config.decode.max_output_len) == (100, 60)
