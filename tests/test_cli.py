"""The command line as a user meets it: what it prints, and how it fails."""

import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from convert.errors import InputError, RunError
from jaxprefix.cli import main
from jaxprefix.run.checkpoint import newest_checkpoint
from tests.base_folders import GOLDEN, make_base_folder
from tests.command_line import BASE, assert_fails, train_flags
from tests.examples import data_file
from tests.runs import PATIENCE, flags_of, metrics_of, run_config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nnot json\n', "data.jsonl, line 2: not a line of JSON"),
        ('{"text": "a"}\n["b"]\n', "data.jsonl, line 2: expected a JSON object"),
        ('{"text": "a"}\n{"title": "b"}\n', "data.jsonl, line 2: has neither `text`"),
        ("", "data.jsonl: holds no example"),
        ('{"text": "a"}\n', "data.jsonl: makes 1 examples, fewer than --train_data_size 14 + --dev_data_size 4"),
    ],
)
def test_data_that_cannot_be_used_is_named_by_its_line(capsys, tmp_path, content, message):
    assert_fails(capsys, train_flags(tmp_path, data_filepath=data_file(tmp_path, content)), message)


def test_missing_data_file(capsys, tmp_path):
    assert_fails(capsys, train_flags(tmp_path, data_filepath=tmp_path / "none.jsonl"), "none.jsonl: no such data file")


def test_base_folder_without_config(capsys, tmp_path):
    assert_fails(capsys, train_flags(tmp_path, pretrained_model_dir=str(tmp_path)), "config.json: no such file")


def test_base_of_another_architecture(capsys, tmp_path):
    base = make_base_folder(tmp_path / "base", model_type="gpt_neox")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert_fails(
        capsys,
        train_flags(tmp_path, pretrained_model_dir=str(base)),
        "model_type is 'llama'; supported: 'gpt_neox', 'gpt2'",
    )


def test_base_that_is_nowhere(capsys, tmp_path):
    assert_fails(
        capsys, train_flags(tmp_path, pretrained_model_dir=str(tmp_path / "a b")), "no such folder, and not a hub id"
    )


def test_prefix_of_another_base(capsys, tmp_path):
    base = make_base_folder(tmp_path / "base", num_hidden_layers=2)
    assert main(["convert", str(GOLDEN / "forward.weight"), str(tmp_path / "prefix"), *BASE]) == 0
    command = ["generate", "--pretrained_model_dir", str(base), "--prompt", "a", "--prefix_checkpoint_path"]
    assert_fails(
        capsys, [*command, str(tmp_path / "prefix")], "another base model", "n_layer: made for 3, this base has 2"
    )


def test_too_few_positions(capsys, tmp_path):
    short = make_base_folder(tmp_path / "base", max_position_embeddings=64)
    flags = train_flags(tmp_path, pretrained_model_dir=str(short))
    too_long = "a prefix of 10 plus 63 tokens (the longest of 3 examples that do not fit)"
    assert_fails(capsys, flags, f"{too_long} exceeds the base model's 64 positions")


def test_unknown_flag(capsys, tmp_path):
    assert_fails(capsys, [*train_flags(tmp_path), "--learning_rat", "1"], "Unrecognized options: --learning_rat")


def test_flags_of_deepspeed_are_named_as_such(capsys, tmp_path):
    given = ["--local-rank=0", "--deepspeed", "--deepspeed_config", "ds_config.json"]
    assert_fails(
        capsys, [*train_flags(tmp_path), *given], "error: --local-rank, --deepspeed, --deepspeed_config: flags of"
    )


def test_output_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    convert = ["convert", str(GOLDEN / "forward.weight"), str(tmp_path / "file" / "p.weight")]
    assert_fails(capsys, convert, "p.weight: cannot be written (File exists)")


def test_all_wrong_settings_are_named_at_once(capsys):
    flags = ["--n_epochs", "0", "--adam_beta1", "1", "--bf16", "--fp16"]
    base = ["train", *BASE, "--data_filepath", "x", "--save_name", "y"]
    assert_fails(capsys, [*base, *flags], "--n_epochs must be positive", "--adam_beta1 must be", "exclude each other")


def test_wrong_decode_settings(capsys):
    command = ["generate", *BASE, "--prompt", "a", "--top_p", "1.5", "--temperature", "0", "--top_k", "-1"]
    assert_fails(
        capsys,
        command,
        "--top_p must be between 0 and 1",
        "--temperature must be finite and at least 1e-06",
        "--top_k must not",
    )


def test_the_original_flags_work_unchanged(tmp_path):
    """The flags of rinna's README and their spelling; --deepspeed's own are DeepSpeed's."""
    flags = """--model_type gpt-neox --prefix_seq_len 5 --prefix_input_dim 6 --prefix_hidden_dim 7 --seed 1
        --batch_size 4 --n_training_steps 1 --n_epochs 1 --n_warmup_steps 0 --n_accum_steps 1 --adam_beta1 0.9
        --adam_beta2 0.99 --adam_eps 1e-8 --weight_decay 0.01 --min_lr 1e-6 --max_lr 1e-4 --grad_clip 1.0
        --train_data_size 14 --dev_data_size 4 --save_log --save_model --save_name r --log_every_n_steps 1
        --filename_note note --bf16"""
    data = ["--data_filepath", str(GOLDEN / "documents.jsonl"), "--output_dir", str(tmp_path)]
    assert main(["train", *BASE, *data, *flags.split()]) == 0
    assert (tmp_path / "r.note" / "prefix" / "adapter_model.safetensors").is_file()
    resumed = ["train", *BASE, *data, *flags.split(), "--resume_training"]
    assert main(resumed) == 0


def test_what_is_quick_to_check_does_not_wait_for_the_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxprefix.inference.load_model", lambda *_, **__: pytest.fail("loaded"))
    data = ["--data_filepath", str(GOLDEN / "documents.jsonl")]
    prefix, prompt = ["--prefix_checkpoint_path", str(tmp_path / "none.weight")], ["--prompt", "朝" * 600]
    assert_fails(
        capsys,
        ["evaluate", *BASE, *data, "--max_output_len", "600"],
        "601 tokens (--max_output_len and the longest prompt of 1)",
        "positions",
    )
    assert_fails(capsys, ["evaluate", *BASE, "--data_filepath", prefix[1]], "none.weight: no such data file")
    assert_fails(capsys, ["generate", *BASE, *prompt], "--max_output_len and the longest prompt", "512 positions")
    for command in (["evaluate"], ["generate", "--prompt", "a"]):
        assert_fails(capsys, [*command, *BASE, *prefix], "none.weight: no such prefix file or folder")


def test_paths_that_the_system_refuses(capsys, tmp_path):
    refused = str(tmp_path / ("a" * 300))
    commands = [
        ["generate", "--pretrained_model_dir", refused, "--prompt", "a"],
        ["generate", *BASE, "--prefix_checkpoint_path", refused, "--prompt", "a"],
        ["check", *BASE, "--data_filepath", refused],
        ["check", *BASE, "--checkpoint_path", refused],
        [*train_flags(tmp_path), "--checkpoint_path", refused],
        ["convert", refused, str(tmp_path / "a.npy")],
    ]
    for command in commands:
        assert_fails(capsys, command, f"error: {refused}: ", "File name too long")


def test_the_command_to_try_can_be_pasted(capsys, tmp_path):
    assert main(train_flags(tmp_path, save_name="a run", n_training_steps=1)) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["jaxprefix", "generate"]
    assert Path(command[command.index("--prefix_checkpoint_path") + 1]).is_dir()


def test_seeds_have_a_limit(capsys, tmp_path):
    for command in (["generate", *BASE, "--prompt", "a"], ["evaluate", *BASE], train_flags(tmp_path)):
        assert_fails(capsys, [*command, "--seed", "9" * 23], "--seed must be")


def test_ctrl_c_in_the_terminal_ends_with_a_checkpoint(tmp_path):
    flags = train_flags(tmp_path, n_epochs=2000, n_training_steps=100000)
    lines = []
    with subprocess.Popen([sys.executable, "-m", "jaxprefix", *flags], stderr=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        for line in process.stderr:
            lines.append(line)
            if "step 6," in line:
                process.send_signal(signal.SIGINT)
        watchdog.cancel()
    assert process.returncode == 130, "".join(lines)
    assert "repeat the command with --resume" in lines[-1]
    assert "Traceback" not in "".join(lines)
    last_step = metrics_of(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / str(last_step)).is_dir()


def test_skipped_lines_are_reported(capsys, tmp_path):
    path = data_file(tmp_path, '{"text": "a"}\n{"text": 5}\n' * 20)
    report = f"skipped 20 of 40 lines of {path}, first: line 2: `text` must be a string, found int"
    assert main([*train_flags(tmp_path, data_filepath=path, n_epochs=1), "--skip_bad_lines"]) == 0
    assert report in (tmp_path / "run" / "log.txt").read_text()
    few = train_flags(tmp_path, data_filepath=path, train_data_size=100)
    assert_fails(capsys, [*few, "--skip_bad_lines"], f"lower one, or both; {report}")
    assert main(["evaluate", *BASE, "--data_filepath", str(path), "--n_samples", "0", "--skip_bad_lines"]) == 0
    assert report in capsys.readouterr().err


@pytest.mark.parametrize("program", [("-m", "jaxprefix"), ("convert.py",)], ids=" ".join)
def test_a_module_of_the_users_that_hides_ours_is_named(tmp_path, program):
    (tmp_path / "convert.py").write_text("import jaxprefix")
    done = subprocess.run([sys.executable, *program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.endswith(
        f"ImportError: {tmp_path / 'convert.py'}: hides jaxprefix's package convert; rename it\n"
    )


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxprefix {importlib.metadata.version('jaxprefix')}\n"
    assert main(["--help"]) == 0
    assert "jaxprefix --version" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [(RunError("nan"), 1), (InputError("no"), 2), (OSError(28, "full", "a"), 2), (KeyboardInterrupt(), 130)],
)
def test_a_process_that_fails_does_not_wait_for_the_others(tmp_path, monkeypatch, error, code):
    def fail(config):
        raise error

    left = []
    monkeypatch.setattr("jaxprefix.train.train", fail)
    monkeypatch.setattr("jaxprefix.machine.hosts.leave_soon", left.append)
    assert main(train_flags(tmp_path)) == code
    assert left == [code]
    monkeypatch.setattr("jaxprefix.train.train", lambda _: sys.exit(143))  # as of SIGTERM at process 1
    with pytest.raises(SystemExit):
        main(train_flags(tmp_path))
    assert left == [code, 143]


def test_python_does_not_walk_all_objects_again_at_its_end():
    """They are frozen by then: seen from a handler that was registered first, and so is called last."""
    program = """
import atexit, gc, sys
atexit.register(lambda: print(len(gc.get_objects()) < 100 < gc.get_freeze_count(), file=sys.stderr))
from jaxprefix.cli import entry_point
entry_point()
"""
    for flags, code in (("--help",), 0), (("generate", "--prompt", "朝"), 2):
        result = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True)
        assert result.returncode == code
        assert result.stderr.splitlines()[-1] == "True"


def test_a_containers_first_process_ends_at_sigterm():
    """Linux keeps the signal from a process 1 that has no handler."""
    program = """
import os, signal
number, os.getpid = os.getpid(), lambda: 1
import jaxprefix.cli
jaxprefix.cli.main = lambda: os.kill(number, signal.SIGTERM)
jaxprefix.cli.entry_point()
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 143


@pytest.mark.parametrize(("stdout", "code"), [(None, 0), ("/dev/full", 1)])
def test_what_is_printed_at_a_runs_end_takes_no_reader_but_a_disk(tmp_path, monkeypatch, capsys, stdout, code):
    config = run_config(tmp_path, n_training_steps=1)
    with open(stdout or os.devnull, "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file if stdout else None)
        assert main(["train", *flags_of(config)]) == code
        sys.stdout.close()
    assert newest_checkpoint(config.run_dir / "checkpoints") == 1
    assert ("error: standard output cannot be written" in capsys.readouterr().err) == bool(code)
