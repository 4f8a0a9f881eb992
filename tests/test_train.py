"""Whole runs: what they leave behind, what they refuse, and that packing changes nothing."""

import json
import shutil
import signal
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxprefix.loop as loop_module
import jaxprefix.train as train_module
from convert.errors import InputError
from convert.prefix import read_prefix
from jaxprefix import load_prefix, start, update
from jaxprefix.check import check
from jaxprefix.config import CheckConfig, Compute, HostsConfig
from jaxprefix.data.examples import Chunking, read_examples
from jaxprefix.evaluation import evaluate
from jaxprefix.inference_config import DecodeConfig, EvaluateConfig
from jaxprefix.machine import devices, hosts
from jaxprefix.metrics import evaluation_batches, loss_and_ppl
from jaxprefix.models import attention, load_model
from jaxprefix.run import folder
from jaxprefix.sharding import make_mesh
from jaxprefix.tokenizer import load_tokenizer
from jaxprefix.train import train
from jaxprefix.update import LossScale
from tests.base_folders import GOLDEN, GOLDEN_BASE, make_base_folder
from tests.runs import before_updates, losses_of, metrics_of, run_config
from tests.tolerances import LOSS


def test_files_of_a_run(finished):
    names = {path.name for path in finished.run_dir.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints", "prefix"}
    config = json.loads((finished.run_dir / "config.json").read_text())
    assert (config["max_lr"], config["base"]["n_layer"]) == (1e-2, "3")


def test_metrics_tell_the_run(finished):
    train_points, dev_points = metrics_of(finished.run_dir), metrics_of(finished.run_dir, "dev")
    assert [point["step"] for point in train_points] == list(range(1, 9))
    assert [point["epoch"] for point in train_points] == [0] * 4 + [1] * 4
    assert [(point["step"], point["epoch"]) for point in dev_points] == [(4, 0), (8, 1)]
    assert {"split", "step", "epoch", "loss", "ppl", "lr", "tokens_per_s"} == train_points[0].keys()
    assert train_points[0]["lr"] == pytest.approx(1e-2)
    assert all(point["ppl"] == pytest.approx(np.exp(point["loss"])) for point in train_points)


def test_training_lowers_the_loss(finished):
    first, *_, last = losses_of(finished.run_dir, "dev")
    assert last < first


def test_log_and_tensorboard_hold_the_same_numbers(finished):
    log = (finished.run_dir / "log.txt").read_text()
    assert log.endswith("s finished after update 8\n")
    point = metrics_of(finished.run_dir)[4]
    assert f"Epoch 1, step 5, lr {point['lr']:.5g} - loss: {point['loss']:.5g}, ppl: {point['ppl']:.5g}" in log
    assert "4,434 trainable parameters" in log
    assert "15,360 bytes" in log
    events = EventAccumulator(str(finished.run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, 9))
    assert events.Scalars("loss/train")[4].value == pytest.approx(point["loss"], rel=1e-6)


def test_the_best_prefix_is_kept(tmp_path, monkeypatch):
    raised = iter([1.0, 0.0, 2.0])  # makes the second of three epochs the best, on every machine

    def dev_loss_raised(*arguments):
        metrics = loss_and_ppl(*arguments)
        return metrics | {"loss": metrics["loss"] + next(raised)}

    monkeypatch.setattr("jaxprefix.loop.loss_and_ppl", dev_loss_raised)
    config = run_config(tmp_path, n_epochs=3)
    train(config)
    losses = losses_of(config.run_dir, "dev")
    assert losses.index(min(losses)) == 1
    model, tokenizer = load_model(GOLDEN_BASE), load_tokenizer(GOLDEN_BASE)
    dev_set = read_examples(config.data_filepath, Chunking(tokenizer))[-4:]
    prefix, mesh = load_prefix(config.run_dir, model.config, tokenizer), make_mesh()
    found = loss_and_ppl(model, prefix, evaluation_batches(dev_set, tokenizer, 4, mesh), mesh)["loss"]
    assert found == pytest.approx(min(losses), rel=LOSS)


def test_a_run_shorter_than_the_log_interval_logs_its_end(tmp_path):
    config = run_config(tmp_path, log_every_n_steps=2, n_training_steps=3)
    train(config)
    assert [point["step"] for point in metrics_of(config.run_dir)] == [2, 3]


def test_skipped_updates_are_counted_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "start", classmethod(lambda cls: cls(jnp.float32(2**30), jnp.int32(0))))
    config = run_config(tmp_path, fp16=True, n_training_steps=3)
    train(config)
    assert [point["skipped"] for point in metrics_of(config.run_dir)] == [1, 2, 3]
    assert [point["lr"] for point in metrics_of(config.run_dir)] == pytest.approx([1e-2] * 3), "the first update's"
    assert "skipped updates: 3" in (config.run_dir / "log.txt").read_text()


def test_an_earlier_run_is_not_touched(finished, monkeypatch):
    before = read_prefix(finished.run_dir)[0]
    monkeypatch.setattr(train_module, "load_model", lambda *_: pytest.fail("loaded a base model before it looked"))
    with pytest.raises(InputError, match="is not empty; use --resume, --overwrite, or another --save_name"):
        train(run_config(finished.output_dir))
    np.testing.assert_array_equal(read_prefix(finished.run_dir)[0], before)


def test_prefix_and_longest_row_must_fit_the_positions(tmp_path):
    message = r"prefix of 500 plus 63 tokens \(the longest of 17 examples that do not fit\) .* 512 positions; "
    with pytest.raises(InputError, match=message + "the text begins with 'ただ、"):
        train(run_config(tmp_path, prefix_seq_len=500))
    assert not any(tmp_path.iterdir()), "nothing is written for a run that cannot start"


def test_overwrite_deletes_runs_and_nothing_else(tmp_path):
    config = run_config(tmp_path, n_training_steps=1, overwrite=True)
    train(config)
    (config.run_dir / "left-over").write_text("from the first run")
    train(config)
    assert not (config.run_dir / "left-over").exists()
    base = make_base_folder(tmp_path / "base")
    with pytest.raises(InputError, match="is not empty, and not a run's folder; --overwrite"):
        train(run_config(tmp_path, name="base", overwrite=True))
    assert (base / "model.safetensors").is_file()


def test_rinna_refuses_accumulation_longer_than_an_epoch(tmp_path):
    with pytest.raises(InputError, match="--n_accum_steps 9 is more than the 4 batches of an epoch"):
        train(run_config(tmp_path, recipe="rinna", train_data_size=13, dev_data_size=1, n_accum_steps=9))


def test_flash_attention_of_cudnn_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "cudnn_takes", lambda head_dim: False)
    config = run_config(tmp_path, dtype="bfloat16", compute=Compute(attention="cudnn"))
    for command in (train, lambda config: list(check(CheckConfig(**vars(config))))):
        with pytest.raises(InputError, match=r"--attention cudnn needs an NVIDIA GPU, .*; found .* and head size 16"):
            command(config)


@pytest.mark.parametrize(("generation", "warned"), [(7, True), (8, False), (None, False)])
def test_bfloat16_is_warned_of_on_gpus_that_are_slow_at_it(tmp_path, monkeypatch, capsys, generation, warned):
    monkeypatch.setattr(devices, "cuda_generation", lambda: generation)
    train(run_config(tmp_path, dtype="bfloat16", n_training_steps=1, save_model=False, save_log=False))
    assert ("WARNING: cpu has no fast bfloat16 products; --fp16" in capsys.readouterr().err) == warned


def test_an_unknown_suffix_is_warned_of(tmp_path):
    config = run_config(tmp_path, suffix=" 🦀", n_training_steps=1)
    train(config)
    log = (config.run_dir / "log.txt").read_text()
    assert "WARNING: the suffix ' 🦀' holds text unknown to the tokenizer" in log
    assert "unknown tokens: 27 (4.27%), in 13 examples" in log


@pytest.mark.parametrize(("suffix", "n_warnings"), [("　", 1), ("", 0)])
def test_a_suffix_that_is_nothing_is_warned_of_unless_that_is_meant(tmp_path, capsys, suffix, n_warnings):
    train(run_config(tmp_path, suffix=suffix, n_training_steps=1, save_model=False, save_log=False))
    assert capsys.readouterr().err.count("is nothing to the tokenizer; it cannot be learnt") == n_warnings


def test_without_saving_nothing_is_written(tmp_path):
    train(run_config(tmp_path, save_model=False, save_log=False, n_training_steps=1))
    assert not any(tmp_path.iterdir())


def test_packed_and_padded_runs_have_the_same_losses(tmp_path):
    changes = {"n_epochs": 10, "n_training_steps": 30}
    packed, padded = (run_config(tmp_path, name=str(p), packing=p, **changes) for p in (True, False))
    for config in (packed, padded):
        train(config)
    assert len(losses_of(packed.run_dir)) == 30
    np.testing.assert_allclose(losses_of(packed.run_dir), losses_of(padded.run_dir), rtol=LOSS)


def test_the_dev_set_is_packed_unless_its_batches_count(tmp_path, monkeypatch):
    """As the original does, a mean over batches depends on what is in each."""
    packed = []

    def spy(base, prefix, batches, *others):
        packed.extend(batch.packing is not None for batch in batches)
        return {"loss": 1.0, "ppl": 1.0}

    for module in ("loop", "evaluation"):
        monkeypatch.setattr(f"jaxprefix.{module}.loss_and_ppl", spy)
    for number, settings in enumerate(({"packing": True}, {"packing": False}, {"packing": True, "recipe": "rinna"})):
        train(run_config(tmp_path, str(number), n_training_steps=1, train_data_size=9, **settings))
    assert packed == [True, False, False]
    packed.clear()
    for recipe in ("default", "rinna"):
        decode = DecodeConfig(recipe=recipe)
        evaluate(EvaluateConfig(str(GOLDEN_BASE), data_filepath=GOLDEN / "documents.jsonl", n_samples=0, decode=decode))
    assert packed == [True, True, False]


UNSAVED = {"n_training_steps": 1, "train_data_size": 9, "save_model": False, "save_log": False}


def test_a_run_with_another_learning_rate_compiles_no_update(tmp_path, traced_anew, monkeypatch):
    traced, loss_and_gradient = [], update.loss_and_gradient
    monkeypatch.setattr(update, "loss_and_gradient", lambda *given: traced.append(1) or loss_and_gradient(*given))
    for changes in {}, {"max_lr": 1e-3, "n_warmup_steps": 3, "seed": 1}:
        train(run_config(tmp_path, **UNSAVED | changes))
    assert len(traced) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.5},
        {"recipe": "rinna"},
        {"batch_size": 2},
        {"prefix_seq_len": 5},
        {"compute": Compute("dense")},
    ],
    ids=str,
)
def test_a_run_of_another_program_has_its_own_update_and_drops_the_last_one(tmp_path, monkeypatch, changes):
    """Or their programs would add up over a sweep."""
    updates = []
    monkeypatch.setattr(train_module, "loop", lambda run, *_: updates.append(run.update))
    for changed in {}, {"save_name": "second"}, changes, {}:
        train(run_config(tmp_path, **UNSAVED | changed))
    first, second, other, last = updates
    assert first is second
    assert len({id(each) for each in (first, other, last)}) == 3


def test_a_run_in_a_thread_hears_no_signals(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, run_config(tmp_path, n_training_steps=1)).result().finished


def test_what_a_run_uses_is_not_overwritten(finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    data = shutil.copy(finished.data_filepath, tmp_path / "run")
    for used in ({"data_filepath": Path(data)}, {"checkpoint_path": tmp_path / "run"}):
        with pytest.raises(InputError, match="--overwrite would delete it; copy it to another folder first"):
            train(run_config(tmp_path, overwrite=True, **used))
    assert Path(data).is_file()


def test_the_dev_sets_rows_must_fit_the_positions_too(tmp_path):
    data = tmp_path / "data.jsonl"
    pairs = [{"prompt": "a", "completion": "b"}] * 4 + [{"prompt": "朝" * 600, "completion": "の"}]
    data.write_text("\n".join(map(json.dumps, pairs)))
    with pytest.raises(InputError, match="a prefix of 10 plus 60"):
        train(run_config(tmp_path, data_filepath=data, train_data_size=4, dev_data_size=1))


def test_signals_are_pythons_again_after_a_run(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    train(run_config(tmp_path, n_training_steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_revision_is_asked_for(tmp_path, monkeypatch):
    def open_base(name, revision, *_, **__):
        raise InputError(f"asked for {revision}")

    training, measuring = run_config(tmp_path, revision="v1"), EvaluateConfig("hub/base", revision="v1")
    for room, command in (("inputs", lambda: train(training)), ("inference", lambda: evaluate(measuring))):
        monkeypatch.setattr(f"jaxprefix.{room}.open_base", open_base)
        with pytest.raises(InputError, match="asked for v1"):
            command()


def test_the_watchdog_hears_of_every_update_and_dev_batch(tmp_path, monkeypatch):
    begun, heard = [], []
    monkeypatch.setattr("jaxprefix.machine.hosts.Watchdog.__enter__", lambda self: begun.append(self._minutes) or self)
    monkeypatch.setattr("jaxprefix.machine.hosts.Watchdog.still_going", lambda self: heard.append(1))
    settings = {"log_every_n_steps": 100, "n_epochs": 1, "dev_data_size": 8, "hosts": HostsConfig(stall_minutes=7.0)}
    train(run_config(tmp_path, **settings))
    assert begun == [7.0]
    assert len(heard) == 1 + 4 + 2 + 1 + 1, "the start, updates, batches of the dev set, the ends of epoch and run"


def test_of_many_processes_the_first_alone_writes_the_prefix(tmp_path, monkeypatch):
    for module in (train_module, loop_module):
        monkeypatch.setattr(module, "is_first", lambda: False)
    monkeypatch.setattr(train_module, "open_shared_folder", lambda config, _: config.run_dir.mkdir())
    monkeypatch.setattr(loop_module, "check_still_there", lambda config: None)
    train(run_config(tmp_path, n_epochs=1))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints"}


def test_whatever_may_fail_on_one_process_is_told_to_all(tmp_path, monkeypatch):
    named, agree = [], train_module.agree
    for module in (train_module, folder, hosts, start):
        monkeypatch.setattr(module, "agree", lambda name, attempt: (named.append(name), agree(name, attempt))[1])
    train(run_config(tmp_path, n_training_steps=1))
    steps = ["read its inputs", "make its mesh", "read the weights", "describe the run", "match process 0's settings"]
    steps += ["check the run's folder", "lock the run's folder", "load the base", "start the prefix"]
    steps += ["start from process 0's encoder"]
    assert named == [*steps, "open the run's folder", "see the run's folder", "open the log"]


def test_whether_there_is_a_checkpoint_the_first_process_says(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "broadcast_from_first", lambda seen_here: np.array(not seen_here))
    assert train_module.has_checkpoint(run_config(tmp_path, resume=True))


def test_tokens_per_second_are_those_of_training_alone(tmp_path, monkeypatch):
    """By a clock that goes on by a second at each update, and by an hour while the dev set is gone through."""
    now = [0.0]
    monkeypatch.setattr(loop_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    before_updates(monkeypatch, lambda _: now.__setitem__(0, now[0] + 1))
    loss_and_ppl = loop_module.loss_and_ppl

    def slow_dev_loss(*given):
        now[0] += 3600
        return loss_and_ppl(*given)

    monkeypatch.setattr(loop_module, "loss_and_ppl", slow_dev_loss)
    config = run_config(tmp_path)
    train(config)
    assert all(point["tokens_per_s"] > 10 for point in metrics_of(config.run_dir))


def test_of_equal_prefixes_the_first_is_kept(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr("jaxprefix.loop.loss_and_ppl", lambda *_: {"loss": 1.0, "ppl": 2.7})
    monkeypatch.setattr("jaxprefix.loop.save_prefix", lambda *arguments: saves.append(arguments))
    train(run_config(tmp_path, n_epochs=2))
    assert len(saves) == 1
