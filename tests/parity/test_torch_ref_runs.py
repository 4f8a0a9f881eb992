"""The reference trains as a program: its quirks, its files and log lines, several ranks.

Each test of a quirk of the original fails when the reference does the sound thing instead.
"""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.base_folders import GOLDEN, GOLDEN_BASE
from tests.parity.runs import reference_run, started_encoder
from tests.runs import PATIENCE, run_config
from tests.tolerances import LOSS
from torch_ref import train
from torch_ref.config import deepspeed_config, train_parser
from torch_ref.data import Example, chunk_document, split_examples
from torch_ref.models import load_base
from torch_ref.prefix import PrefixEncoder, fit
from torch_ref.update import DeepSpeedSteps, PlainSteps, lr_lambda

ROOT = Path(__file__).parents[2]
LOG_LINE = r"\d+\.\d\ds Epoch \d+, step \d+, lr [\d.e-]+ - loss: [\d.]+, ppl: [\d.]+"
DEV_LINE = r"\d+\.\d\ds Epoch \d+, dev - monitor: [\d.]+, ppl: [\d.]+"


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    """An encoder for the golden base, so that no run has to fit one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    torch.save(PrefixEncoder(3, 4, 64, 10, 10, 10).state_dict(), path)
    return path


@pytest.fixture
def run(tmp_path, encoder_file):
    """A short run: nine examples in three batches, one epoch."""
    few = {"train_data_size": 9, "dev_data_size": 5, "n_epochs": 1}
    return lambda *extra, **changes: reference_run(tmp_path, encoder_file, *extra, **few | changes)


def flags_of(base=GOLDEN_BASE, **changes):
    flags = {"pretrained_model_dir": base, "data_filepath": GOLDEN / "documents.jsonl", "save_name": "run"} | changes
    return train_parser().parse_args([str(part) for name, value in flags.items() for part in (f"--{name}", value)])


def test_document_tail_is_dropped(reference_tokenizer):
    assert chunk_document("今日は晴れです。\n明日は雨です。", reference_tokenizer) == []


def test_long_sentence_is_one_chunk(reference_tokenizer):
    chunks = chunk_document("短い。\n" + "猫が好きです" * 30 + "\n短い。", reference_tokenizer)
    assert [len(chunk) > 64 for chunk in chunks] == [False, True]


def test_fewer_chunks_than_asked_for():
    with pytest.raises(ValueError, match="1 chunks are fewer than 1 for training \\+ 1"):
        split_examples([Example([], [5])], 1, 1)


def test_schedule_warms_up_and_decays_to_zero():
    for n, expected in ((10, [0, 0.25, 1, 0.5, 0, 0]), (4, [0, 0.25, 0, 0, 0, 0])):
        assert [*map(lr_lambda(flags_of(n_training_steps=n, n_warmup_steps=4)), (0, 1, 4, 7, 10, 12))] == expected


def test_schedule_is_stepped_once_without_deepspeed(run):
    record = run(n_training_steps=6, n_epochs=2, max_lr=0.06)
    np.testing.assert_allclose(record.rates, [0.06, 0.05, 0.04, 0.03, 0.02, 0.01])


@pytest.mark.deepspeed
def test_schedule_is_stepped_twice_under_deepspeed(run):
    record = run("--deepspeed", n_training_steps=6, n_epochs=2, max_lr=0.06)
    np.testing.assert_allclose(record.rates, [0.06, 0.04, 0.02, 0, 0, 0], atol=1e-9)


def test_accumulation_is_a_sum_without_deepspeed():
    encoder = PrefixEncoder(1, 2, 8, 2, 3, 3)
    steps = PlainSteps(encoder, flags_of(n_accum_steps=2), 0)
    assert not steps.step(encoder.folded().sum())
    with patch("torch.nn.utils.clip_grad_norm_"), patch.object(steps.optimizer, "zero_grad"):
        assert steps.step(encoder.folded().sum())
    np.testing.assert_array_equal(encoder.prefix_mlp[2].bias.grad, 4.0)  # 2 positions × 2 micro-batches


@pytest.mark.deepspeed
def test_accumulation_is_a_mean_under_deepspeed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder, flags = PrefixEncoder(1, 2, 8, 2, 3, 3), flags_of(n_accum_steps=2)
    flags.deepspeed = True
    train.start_ranks(flags)
    steps = DeepSpeedSteps(encoder, flags, 0)
    assert not steps.step(steps.forward(1).sum())
    np.testing.assert_array_equal(encoder.prefix_mlp[2].bias.grad, 1.0)  # 2 positions ÷ 2 micro-batches


def test_a_run_that_fits_its_encoder_is_the_one_that_starts_from_the_fitted_encoder(run, tmp_path):
    """The last fitting step's gradient is no part of the first update."""

    def fit_and_save(encoder, target):
        fit(encoder, target)
        torch.save(encoder.state_dict(), tmp_path / "fitted.pt")

    with patch.object(train, "fit", fit_and_save):
        fitting = run(checkpoint_path="")
    assert fitting.losses == run(checkpoint_path=tmp_path / "fitted.pt").losses


def test_unfinished_accumulation_joins_the_next_epoch(run):
    assert len(run(n_accum_steps=2).rates) == 1
    carried, step = [], PlainSteps.step

    def noted(steps, loss):
        carried.append(any(p.grad is not None and bool(p.grad.any()) for p in steps.encoder.parameters()))
        return step(steps, loss)

    with patch.object(PlainSteps, "step", noted):
        assert len(run(n_accum_steps=2, n_epochs=2).rates) == 3
    assert carried == [False, True] * 3


def test_dev_means_are_not_weighted_by_tokens(run):
    seen = []
    original = train.batch_loss

    def spy(*arguments):
        seen.append((original(*arguments), (arguments[2][1] != arguments[3]).sum()))
        return seen[-1][0]

    with patch.object(train, "batch_loss", spy):
        record = run(n_training_steps=1)
    losses, counts = (np.array([float(value) for value in column]) for column in zip(*seen[-2:], strict=True))
    monitor, ppl = record.dev[0]
    np.testing.assert_allclose([monitor, ppl], [losses.mean(), np.exp(losses).mean()], rtol=1e-6)
    assert abs(monitor - np.average(losses, weights=counts)) > 1e-4


def test_files_and_log_lines(run, tmp_path, capsys):
    run("--save_log", "--save_model", n_epochs=2, filename_note="note", log_every_n_steps=2)
    stem = r"reference_prefix_encoder\.seed42\.\d{4}(-\d\d){5}\.note"
    names = sorted(path.name for path in tmp_path.iterdir())
    patterns = [rf"{stem}\.best\.checkpoint", rf"{stem}\.checkpoint", rf"{stem}\.log", rf"{stem}\.tensorboard"]
    assert all(map(re.fullmatch, patterns, names)), names
    lines = (tmp_path / names[2]).read_text().splitlines()
    assert lines == [line for line in capsys.readouterr().out.splitlines() if "Epoch" in line]
    assert [bool(re.fullmatch(LOG_LINE, line)) for line in lines] == [True, False, True, True, False]
    assert [bool(re.fullmatch(DEV_LINE, line)) for line in lines] == [False, True, False, False, True]
    board = EventAccumulator(str(tmp_path / names[3])).Reload()
    steps = {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert steps == {"loss/train": [2, 4, 6], "ppl/train": [2, 4, 6], "monitor/dev": [0, 1], "ppl/dev": [0, 1]}


def test_the_best_prefix_is_that_of_the_lowest_dev_loss(run, monkeypatch):
    losses = iter([(3.0, 1.0), (2.0, 1.0), (2.0, 1.0)])
    kept = []
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda tensor, path: kept.append(path) or save(tensor, path))
    run("--save_model", n_epochs=3)
    assert ["best" in str(path) for path in kept] == [False, True, False, True, False]


def test_saved_tensor_still_requires_grad(run, tmp_path):
    run("--save_model", n_training_steps=1)
    saved = torch.load(next(tmp_path.glob("*.best.checkpoint")), weights_only=True)
    assert saved.requires_grad
    assert saved.shape == (10, 3 * 2 * 64)


def test_checkpoint_path_wants_the_encoders_state_which_no_run_writes(run, tmp_path):
    run("--save_model", n_training_steps=1)
    with pytest.raises(TypeError, match="expected a dict with the encoder's state, found Tensor"):
        run(checkpoint_path=next(tmp_path.glob("*.best.checkpoint")))


@pytest.mark.parametrize("extra", [["--resume_training"], ["--min_lr", "0.5"]])
def test_flags_without_effect(run, extra):
    assert run(*extra).losses == run().losses


def test_min_lr_stands_in_the_deepspeed_config():
    assert deepspeed_config(flags_of(min_lr=0.5))["scheduler"]["params"]["warmup_min_lr"] == 0.5


def test_training_passes_neither_positions_nor_a_mask(gpt2_folder):
    base = load_base(flags_of(gpt2_folder, model_type="gpt"))
    encoder, batch = PrefixEncoder.of(base, 4, 3, 3), (torch.tensor([[1, 5, 3]]), torch.tensor([[5, 2, 3]]))
    with patch.object(base, "forward", wraps=base.forward) as forward:
        train.batch_loss(base, encoder(1), batch, 3)
    assert forward.call_args.kwargs.keys() == {"past_key_values"}


def test_gpt2_trains(gpt2_folder, tmp_path):
    flags = flags_of(gpt2_folder, model_type="gpt", train_data_size=9, dev_data_size=5, n_epochs=4, max_lr=1e-2)
    with contextlib.chdir(tmp_path):
        record = train.train(flags)
    assert record.dev[-1][0] < record.dev[0][0]


LAUNCHERS = [
    pytest.param(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"], id="torchrun"
    ),
    pytest.param(
        [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--module"],
        id="deepspeed",
        marks=pytest.mark.deepspeed,
    ),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_log_and_save_once_and_end_equal(launcher, tmp_path, encoder_file):
    flags = ["--pretrained_model_dir", GOLDEN_BASE, "--data_filepath", GOLDEN / "documents.jsonl", "--save_name", "run"]
    flags += ["--train_data_size", 8, "--dev_data_size", 4, "--batch_size", 2, "--n_epochs", 2, "--max_lr", 1e-2]
    flags += ["--checkpoint_path", encoder_file, "--log_every_n_steps", 1, "--save_model", "--save_log"]
    flags += ["--deepspeed"] if "--module" in launcher else ["--save_state", "state.pt"]
    command = [*launcher, "tests.parity.each_rank", tmp_path, *flags]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(LOG_LINE, done.stdout)) == 4  # 8 examples ÷ 2 ranks ÷ 2, twice
    assert len(re.findall(DEV_LINE, done.stdout)) == 2
    n_files = {kind: len(list(tmp_path.glob(f"rank0/*.{kind}"))) for kind in ("checkpoint", "log")}
    assert n_files == {"checkpoint": 2, "log": 1}  # the last prefix and the best
    assert not any((tmp_path / "rank1").iterdir())
    initial, first, second = (
        torch.load(path, weights_only=True) for path in (encoder_file, tmp_path / "rank0.pt", tmp_path / "rank1.pt")
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert not torch.equal(first[name], initial[name]), name


def test_every_epoch_has_a_random_order_of_its_own():
    torch.manual_seed(0)
    orders = [train.epoch_order(20, 42, epoch) for epoch in range(2)]
    assert [sorted(order) for order in orders] == [[*range(20)]] * 2
    assert orders[0] != orders[1] != [*range(20)] != orders[0]


def test_the_seed_decides_the_order(tmp_path, encoder_file):
    sizes = {"checkpoint_path": encoder_file, "train_data_size": 9, "dev_data_size": 5, "n_training_steps": 2}
    with contextlib.chdir(tmp_path):
        losses = [train.train(flags_of(seed=seed, **sizes)).losses for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_micro_batches_that_were_applied_are_not_seen_again(tmp_path):
    torch.save(started_encoder(run_config(tmp_path)), tmp_path / "encoder.pt")
    sizes = {"train_data_size": 10, "n_accum_steps": 2}  # three batches an epoch
    whole = reference_run(tmp_path, tmp_path / "encoder.pt", n_epochs=2, **sizes)
    reference_run(tmp_path, tmp_path / "encoder.pt", "--save_state", tmp_path / "state.pt", n_epochs=1, **sizes)
    rest = reference_run(tmp_path, tmp_path / "state.pt", n_epochs=2, **sizes)
    np.testing.assert_allclose(rest.losses, whole.losses[2:], rtol=LOSS)


def test_updates_clip_and_decay_as_the_flags_say():
    encoder = PrefixEncoder(1, 2, 8, 2, 3, 3)
    steps = PlainSteps(encoder, flags_of(grad_clip=0.5, weight_decay=0.25, adam_eps=1e-3), 0)
    assert [(g["weight_decay"], g["eps"]) for g in steps.optimizer.param_groups] == [(0.25, 1e-3), (0.0, 1e-3)]
    with patch.object(steps.optimizer, "zero_grad"):
        steps.step(100 * encoder.folded().sum())
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    np.testing.assert_allclose(norm, 0.5, rtol=1e-5)


def test_each_log_point_is_of_the_batches_since_the_last(tmp_path, encoder_file, capsys):
    record = reference_run(tmp_path, encoder_file, n_epochs=2, log_every_n_steps=3)
    told = re.findall(r"step [36], .* loss: ([\d.]+), ppl: ([\d.]+)", capsys.readouterr().out)
    losses = np.reshape(record.losses, (2, 3))
    expected = np.stack([losses.mean(axis=1), np.exp(losses).mean(axis=1)], axis=1)
    np.testing.assert_allclose(np.array(told, float), expected, rtol=1e-4)


def test_a_run_ends_with_its_steps_though_an_epoch_ends_with_them_too(tmp_path, encoder_file):
    record = reference_run(tmp_path, encoder_file, n_epochs=3, n_training_steps=3)
    assert (len(record.rates), len(record.dev)) == (3, 1)
