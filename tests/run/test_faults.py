"""What can end a run early: each way ends it plainly, and what was good before is still there to go on from."""

import errno
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest

import jaxprefix.loop as loop_module
from convert.errors import RunError
from convert.prefix import read_prefix
from jaxprefix.cli import main
from jaxprefix.data.plan import UpdatePlan
from jaxprefix.inputs import read_inputs
from jaxprefix.metrics import loss_and_ppl, loss_on_mesh
from jaxprefix.run import faults
from jaxprefix.run.checkpoint import Checkpoints, newest_checkpoint
from jaxprefix.run.faults import FiniteGuard, stop_on_signal, within_disk
from jaxprefix.train import train
from jaxprefix.update import LossScale, Outcome
from tests.base_folders import GOLDEN_BASE, changed_weights
from tests.runs import (
    CACHE_ALL,
    PATIENCE,
    assert_same_end,
    at_update,
    flags_of,
    losses_of,
    metrics_of,
    run_config,
    start,
)
from tests.torture.disk import OWN_MOUNTS, can_mount


@pytest.fixture(autouse=True)
def under_nohup_too():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def twice() -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("finite_alone", [False, True])
def test_a_run_that_diverges_ends_with_its_last_good_checkpoint(tmp_path, monkeypatch, finite_alone):
    heard = []
    monkeypatch.setattr("jaxprefix.machine.hosts.Watchdog.still_going", lambda self: heard.append(1))
    if finite_alone:
        monkeypatch.setattr("jaxprefix.loop.loss_and_ppl", lambda *_, **__: {"loss": 1.0})
    changes = {"prefix_hidden_dim": 0, "max_lr": 1e38, "grad_clip": 0.0, "checkpoint_every_n_steps": 1}
    config = run_config(tmp_path, **changes)
    told = r"update 2: the loss is nan.*checkpoints/1, but --resume would come to the same update"
    with pytest.raises(RunError, match=told) as error:
        train(config)
    assert "Either --max_lr 1e+38 is too high, or one of these" in str(error.value)
    assert f"s error: {error.value}\n" in (config.run_dir / "log.txt").read_text()
    lines = re.findall(rf"\n  - {config.data_filepath}, line ([0-9]+): '", str(error.value))
    numbers = UpdatePlan(config, 14).micro_batches(1)[0]
    assert lines == list(map(str, read_inputs(config).train_set.line_numbers[numbers])), "all of the update's"
    assert len(heard) == 1 + 1 + 1 + 4, "the start, an update, what its checkpoint took, the other's examples"
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["1"]
    assert all(math.isfinite(loss) for loss in losses_of(config.run_dir))


def test_the_example_that_is_not_finite_is_named(tmp_path, tokenizer):
    """One piece of the vocabulary has an embedding so large that its sum is infinite."""
    base = shutil.copytree(GOLDEN_BASE, tmp_path / "base")
    piece = tokenizer.encode("鯛")[-1]
    with changed_weights(base) as weights:
        weights["gpt_neox.embed_in.weight"][piece] = 3e38
    data = tmp_path / "data.jsonl"
    pairs = [{"prompt": "朝", "completion": text} for text in ("市場", "市場。", "鯛", "魚屋", "声")]
    data.write_text("\n".join(json.dumps(pair) for pair in pairs))
    changes = {"data_filepath": data, "train_data_size": 4, "dev_data_size": 1}
    n_programs = loss_on_mesh._cache_size()
    with pytest.raises(RunError, match="update 1: the loss is nan") as error:
        train(run_config(tmp_path, pretrained_model_dir=str(base), **changes))
    assert loss_on_mesh._cache_size() == n_programs + 1, "one for all examples, whatever their lengths"
    first, *examples = str(error.value).split("\n  - ")
    assert "the run has no checkpoint" in first
    assert [line.partition(":")[0] for line in examples] == [f"{data}, line 3"]


def test_float16_skips_so_many_updates_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "start", classmethod(lambda cls: cls(jnp.float32(math.inf), jnp.int32(0))))
    monkeypatch.setattr(faults, "MOST_SKIPPED", 3)
    config = run_config(tmp_path, fp16=True)
    with pytest.raises(RunError, match=r"update 4: .* float16 has skipped the 3 updates before"):
        train(config)
    assert [point["skipped"] for point in metrics_of(config.run_dir)] == [1, 2, 3]


def test_a_skipped_update_without_a_loss_is_no_part_of_the_means(tmp_path, monkeypatch):
    add, lost = loop_module.InFlight.add, Outcome(*[jnp.float32(math.nan)] * 2)

    def overflowing(in_flight, number, outcome, n_labels):
        add(in_flight, number, lost if number in (1, 3, 4) else outcome, n_labels)

    monkeypatch.setattr(loop_module.InFlight, "add", overflowing)
    config = run_config(tmp_path, fp16=True, n_training_steps=4, log_every_n_steps=2)
    train(config)
    of_one, of_none = losses_of(config.run_dir)
    assert 0 < of_one < 10
    assert of_none is None


def test_skipped_updates_must_follow_one_another(tmp_path):
    guard = FiniteGuard(run_config(tmp_path, fp16=True), n_skipped=20)
    assert guard.fault(1, 1.0, 1.0) is None
    assert guard.fault(2, 1.0, math.inf) is None
    assert guard.n_skipped == 1


def test_a_dev_loss_that_is_never_finite_keeps_no_prefix(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxprefix.loop.loss_and_ppl", lambda *arguments: {"loss": math.nan, "ppl": math.nan})
    config = run_config(tmp_path, n_training_steps=1)
    assert main(["train", *flags_of(config)]) == 1
    assert "error: no dev loss was finite" in capsys.readouterr().err
    assert not (config.run_dir / "prefix").exists()
    assert losses_of(config.run_dir, "dev") == [None], "NaN is not JSON"


def test_the_seed_decides_every_bit(finished, tmp_path):
    again, other = (run_config(tmp_path, name, seed=seed) for name, seed in (("again", finished.seed), ("other", 1)))
    train(again)
    train(other)
    assert_same_end(again, finished)
    assert (read_prefix(other.run_dir)[0] != read_prefix(finished.run_dir)[0]).any()


@pytest.mark.parametrize(("first", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_exit_code_tells_the_first_of_several_kinds_of_signal(tmp_path, monkeypatch, first, code):
    monkeypatch.setattr("jaxprefix.run.faults.ONE_SIGNAL", -1)
    signals = [first, *{signal.SIGTERM, signal.SIGHUP} - {first}]
    at_update(monkeypatch, 2, lambda: [*map(signal.raise_signal, signals)])
    config = run_config(tmp_path)
    assert main(["train", *flags_of(config)]) == code
    assert newest_checkpoint(config.run_dir / "checkpoints") == 2


def test_a_closed_terminal_ends_with_a_checkpoint(tmp_path):
    terminal, its_other_end = pty.openpty()
    in_terminal = "import os, runpy; os.setsid()"
    in_terminal += f"; [os.dup2(os.open({os.ttyname(its_other_end)!r}, os.O_RDWR), n) for n in (1, 2)]"
    in_terminal += "; runpy.run_module('jaxprefix', run_name='__main__')"
    config = run_config(tmp_path, n_epochs=2000, n_training_steps=100000)
    with start(config, program=("-c", in_terminal)) as process:
        shown = b""
        while b"step 6," not in shown:
            shown += os.read(terminal, 1024)
        os.close(its_other_end)
        os.close(terminal)
        assert process.wait(timeout=PATIENCE) == 129
    last_step = metrics_of(config.run_dir)[-1]["step"]
    assert newest_checkpoint(config.run_dir / "checkpoints") == last_step
    assert f"stopped after update {last_step}" in (config.run_dir / "log.txt").read_text().splitlines()[-1]


def test_nohup_keeps_a_run_from_noticing_its_terminal(finished, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_update(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGHUP))
    config = run_config(tmp_path)
    assert train(config).finished
    assert_same_end(config, finished)


@pytest.mark.parametrize("closed", ["stderr", "stdout"])
def test_a_closed_pipe_ends_no_run(tmp_path, closed):
    """As when what reads the output, like tee or head, ends before the run. The other stream stays."""
    config = run_config(tmp_path)
    with start(config) as process:
        process.stderr.readline()
        getattr(process, closed).close()
        told = (process.stdout if closed == "stderr" else process.stderr).read()
        assert process.wait(timeout=PATIENCE) == 0
    assert ("best prefix: " if closed == "stderr" else "dev - monitor") in told
    assert "Traceback" not in told
    assert newest_checkpoint(config.run_dir / "checkpoints") == 8
    *_, evaluated, ended = (config.run_dir / "log.txt").read_text().splitlines()
    assert "dev - monitor" in evaluated
    assert ended.endswith("s finished after update 8")


def test_a_signal_during_the_last_update_changes_nothing(finished, tmp_path, monkeypatch):
    at_update(monkeypatch, 8, lambda: signal.raise_signal(signal.SIGTERM))
    config = run_config(tmp_path)
    result = train(config)
    assert (result.finished, result.stopped_by) == (True, signal.SIGTERM), "a loop over runs can stop"
    assert_same_end(config, finished)
    monkeypatch.setattr("jaxprefix.train.train", lambda config: result)
    assert main(["train", *flags_of(config)]) == 0


def test_two_signals_in_a_row_are_one(tmp_path, monkeypatch):
    """As from a launcher that passes on what its process group was sent, too."""
    at_update(monkeypatch, 6, twice)
    assert main(["train", *flags_of(config := run_config(tmp_path))]) == 143
    assert newest_checkpoint(config.run_dir / "checkpoints") == 6


def test_a_second_signal_ends_at_once(finished, tmp_path, monkeypatch, capsys):
    config = run_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("jaxprefix.run.faults.ONE_SIGNAL", -1)
        at_update(patch, 6, twice)
        assert main(["train", *flags_of(config)]) == 1
    newest = config.run_dir / "checkpoints" / "4"
    ending = f"error: a second signal ended the run at once; the last good checkpoint is {newest}, --resume goes on"
    assert ending in capsys.readouterr().err
    assert f"s {ending}" in (config.run_dir / "log.txt").read_text()
    train(run_config(tmp_path, resume=True))
    assert_same_end(config, finished)


def test_one_of_many_processes_that_is_ended_at_once_waits_for_no_update(tmp_path, monkeypatch):
    """The others may never make their part of it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "block_until_ready", Mock(side_effect=AssertionError))
    with pytest.raises(RunError, match="a second signal ended the run at once"), stop_on_signal(run_config(tmp_path)):
        raise KeyboardInterrupt


def test_too_little_memory_tells_by_how_much(tmp_path, monkeypatch, capsys):
    at_update(monkeypatch, 6, lambda: jnp.zeros(2**47, jnp.uint8).block_until_ready())
    assert main(["train", *flags_of(config := run_config(tmp_path))]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1] in (config.run_dir / "log.txt").read_text()
    assert "error: out of memory: 131072.00 GiB were requested at once; this machine has " in error
    assert (
        "this run can use --remat block or more devices with --mesh fsdp=N, a new one also a --batch_size below "
        in error
    )
    assert "checkpoints/4, --resume goes on from it" in error


def test_errors_of_a_device_that_is_not_full_stay_what_they_are(tmp_path, monkeypatch):
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: something is wrong with us")

    at_update(monkeypatch, 2, fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train(run_config(tmp_path))


@pytest.mark.parametrize("update", [2, 5])
def test_a_run_folder_that_vanishes_ends_the_run(tmp_path, monkeypatch, update):
    config = run_config(tmp_path)
    at_update(monkeypatch, update, lambda: config.run_dir.rename(tmp_path / "elsewhere"))
    with pytest.raises(RunError, match=r"run: vanished while the run was going on"):
        train(config)
    assert not (config.run_dir / "config.json").exists()
    assert not (config.run_dir / "prefix").exists()


def test_a_folder_that_vanishes_while_a_checkpoint_is_finished_is_not_made_again(tmp_path, monkeypatch):
    config, finish = run_config(tmp_path), Checkpoints.finish

    def vanish_after(checkpoints):
        finish(checkpoints)
        monkeypatch.setattr(Checkpoints, "finish", finish)
        config.run_dir.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(Checkpoints, "finish", vanish_after)
    with pytest.raises(RunError, match=r"run: vanished while the run was going on"):
        train(config)
    assert not config.run_dir.exists()


def test_a_folder_that_vanishes_during_an_evaluation_is_not_made_again(tmp_path, monkeypatch):
    config = run_config(tmp_path, n_epochs=1)
    finish, measured = Checkpoints.finish, []

    def measure(*arguments):
        measured.append(1)
        return loss_and_ppl(*arguments)

    def vanish_after(checkpoints):
        finish(checkpoints)
        if measured:
            shutil.rmtree(config.run_dir, ignore_errors=True)

    monkeypatch.setattr("jaxprefix.loop.loss_and_ppl", measure)
    monkeypatch.setattr(Checkpoints, "finish", vanish_after)
    with pytest.raises(RunError, match=r"run: vanished while the run was going on"):
        train(config)
    assert not config.run_dir.exists()


def test_a_failing_disk_is_told_of_with_what_is_left(finished):
    message = r"log.txt: cannot be written \(No space left on device\); the last good checkpoint is .*/8, --resume"
    with pytest.raises(RunError, match=message), within_disk(finished):
        raise OSError(errno.ENOSPC, "No space left on device", "log.txt")


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only_or_gone(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("needs user namespaces, to mount a small file system")
    command = [*OWN_MOUNTS, sys.executable, "-m", "tests.torture.disk", tmp_path]
    kept = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir, **CACHE_ALL}
    result = subprocess.run(command, env=os.environ | kept, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_update_is_named_though_another_is_under_way(tmp_path):
    """Without a log point the loop is one update ahead."""
    with pytest.raises(RunError, match="update 2: the loss is nan"):
        train(run_config(tmp_path, prefix_hidden_dim=0, max_lr=1e38, grad_clip=0.0, log_every_n_steps=100))


def test_a_checkpoint_under_way_is_finished_before_it_is_named(tmp_path, monkeypatch):
    events, what_is_left = [], loop_module.what_is_left
    monkeypatch.setattr(Checkpoints, "save", lambda *_: events.append("save"))
    monkeypatch.setattr(Checkpoints, "finish", lambda _: events.append("finish"))
    monkeypatch.setattr(
        loop_module, "what_is_left", lambda *given, **how: events.append("told") or what_is_left(*given, **how)
    )
    changes = {"prefix_hidden_dim": 0, "max_lr": 1e38, "grad_clip": 0.0, "checkpoint_every_n_steps": 1}
    with pytest.raises(RunError, match="update 2"):
        train(run_config(tmp_path, **changes))
    assert events[:4] == ["finish", "save", "finish", "told"]
