"""Training states on their way between us and PyTorch."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from convert.errors import InputError
from convert.prefix import read_prefix, to_folded
from jaxprefix import load_model
from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert
from jaxprefix.recipe import RECIPES
from jaxprefix.run.checkpoint import Checkpoints, from_names
from jaxprefix.run.lock import only_writer
from jaxprefix.start import abstract_state, start_encoder
from jaxprefix.train import train
from tests.base_folders import GOLDEN, GOLDEN_BASE, make_base_folder
from tests.conversion import converted
from tests.convert.test_training_state import ENCODER
from tests.parity.runs import encoder_state, reference_run, started_encoder
from tests.runs import losses_of, metrics_of, newest_state, run_config, stop_at
from tests.tolerances import LOSS, RATE

RINNA = {"recipe": "rinna", "train_data_size": 10, "n_training_steps": 60}


@pytest.fixture
def stepped_once(monkeypatch):
    """Without DeepSpeed the original steps the schedule once."""
    monkeypatch.setitem(RECIPES, "rinna", dataclasses.replace(RECIPES["rinna"], schedule_steps_per_update=1))


@pytest.fixture
def uninterrupted(tmp_path, stepped_once):
    """Twelve updates here, three an epoch: (losses, rates)."""
    config = run_config(tmp_path / "whole", **RINNA, n_epochs=4)
    train(config)
    return losses_of(config.run_dir), [point["lr"] for point in metrics_of(config.run_dir)]


def test_a_run_goes_on_in_pytorch(tmp_path, uninterrupted):
    config = run_config(tmp_path, **RINNA, n_epochs=2)
    train(config)
    state = converted(config.run_dir, tmp_path / "state.pt", GOLDEN_BASE)
    record = reference_run(tmp_path, state, n_epochs=4)
    np.testing.assert_allclose(record.losses, uninterrupted[0][6:], rtol=LOSS)
    np.testing.assert_allclose(record.rates, uninterrupted[1][6:], rtol=RATE)


def test_a_run_of_pytorch_goes_on_here(tmp_path, uninterrupted):
    start = run_config(tmp_path, "start", **RINNA, n_epochs=4)
    encoder = tmp_path / "encoder.pt"
    torch.save(started_encoder(start), encoder)
    record = reference_run(tmp_path, encoder, "--save_state", tmp_path / "state.pt", n_epochs=2)
    np.testing.assert_allclose(record.losses, uninterrupted[0][:6], rtol=LOSS)
    converted(tmp_path / "state.pt", tmp_path / "run", GOLDEN_BASE)
    config = run_config(tmp_path, "run", **RINNA, n_epochs=4, resume=True)
    assert train(config).n_done == 12
    np.testing.assert_allclose(losses_of(config.run_dir), uninterrupted[0][6:], rtol=LOSS)
    np.testing.assert_allclose([point["lr"] for point in metrics_of(config.run_dir)], uninterrupted[1][6:], rtol=RATE)
    with pytest.raises(InputError, match="already has a checkpoint of update 12; the source is only at 6"):
        converted(tmp_path / "state.pt", tmp_path / "run")
    train(other := run_config(tmp_path, "other", prefix_seq_len=3, n_training_steps=1))
    with pytest.raises(InputError, match=r"encoder.prefix_wte.weight: expected shape \(3, 10\), found \(10, 10\)"):
        converted(tmp_path / "state.pt", other.run_dir)


def test_a_float16_run_changes_sides_without_its_loss_scale(tmp_path):
    config = run_config(tmp_path, dtype="float16", n_training_steps=1)
    train(config)
    state = converted(config.run_dir, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"becomes a run folder, not a \.weight file"):
        converted(state, tmp_path / "prefix.weight")
    converted(state, tmp_path / "again")
    with pytest.raises(InputError, match="does not fit this run"):
        train(run_config(tmp_path, "again", dtype="float16", prefix_seq_len=3, resume=True))
    assert train(run_config(tmp_path, "again", dtype="float16", n_training_steps=2, resume=True)).n_done == 2


def test_a_torch_file_with_the_encoders_state_starts_a_run(tmp_path, golden_model, tokenizer):
    path = tmp_path / "encoder.pt"
    saved = started_encoder(run_config(tmp_path, seed=43))
    torch.save(saved, path)
    config = run_config(tmp_path, checkpoint_path=path)
    found = encoder_state(start_encoder(config, golden_model, tokenizer, None))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())
    longer = run_config(tmp_path, checkpoint_path=path, prefix_seq_len=11)
    with pytest.raises(InputError, match=r"prefix_wte.weight: expected shape \(11, 10\), found \(10, 10\)"):
        start_encoder(longer, golden_model, tokenizer, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"encoder": ENCODER}, "holds an encoder without its optimizer"),
        ({"encoder": ENCODER | {"prefix_mlp.0.bias": torch.ones(9)}}, r"expected shape \(4,\), found \(9,\)"),
    ],
)
def test_what_is_no_training_state_makes_no_run(tmp_path, content, message):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(InputError, match=message):
        converted(tmp_path / "state.pt", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_encoder_for_a_base_of_another_size(tmp_path):
    torch.save(ENCODER, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"it has 8 numbers per position, this model 384 = 2"):
        converted(tmp_path / "state.pt", tmp_path / "run", GOLDEN_BASE)
    sizes = {"prefix_wte.weight": (512, 3), "prefix_mlp.2.weight": (384, 4), "prefix_mlp.2.bias": (384,)}
    torch.save(ENCODER | {name: torch.ones(shape) for name, shape in sizes.items()}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="prefix length 512 leaves no room in 512 positions"):
        converted(tmp_path / "state.pt", tmp_path / "run", GOLDEN_BASE)


def test_a_run_of_another_base_of_that_width(tmp_path):
    train(run := run_config(tmp_path, n_training_steps=1))
    state = converted(run.run_dir, tmp_path / "state.pt", GOLDEN_BASE)
    other = make_base_folder(tmp_path / "base", num_attention_heads=8)
    told = r"run: the run is for another base model:\n(.|\n)*n_head: made for 4, this base has 8"
    for source, target in (run.run_dir, tmp_path / "again.pt"), (state, run.run_dir):
        with pytest.raises(InputError, match=told):
            converted(source, target, other)
    assert not (tmp_path / "again.pt").exists()


def test_a_prefix_trained_directly_has_no_training_state(tmp_path):
    config = run_config(tmp_path, prefix_hidden_dim=0, n_training_steps=1)
    train(config)
    with pytest.raises(InputError, match="run: was trained without an encoder, --prefix_hidden_dim 0; convert its pr"):
        convert(ConvertConfig(config.run_dir, tmp_path / "state.pt"))


def test_a_training_state_goes_into_no_strangers_folder(tmp_path):
    state = {"encoder": ENCODER, "optimizer": {"step": 3, "exp_avg": ENCODER, "exp_avg_sq": ENCODER}}
    torch.save(state, tmp_path / "state.pt")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "prompts.txt").touch()
    for target in ("texts", "texts/prompts.txt"):
        with pytest.raises(InputError, match=f"{target}: is neither a run's folder nor an empty one"):
            converted(tmp_path / "state.pt", tmp_path / target)
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["prompts.txt"]


def test_a_training_state_goes_into_no_run_that_is_in_use_or_as_far(tmp_path):
    run = run_config(tmp_path, n_training_steps=2)
    train(run)
    state = converted(run.run_dir, tmp_path / "state.pt")
    with only_writer(tmp_path / "other"), pytest.raises(InputError, match="is in use by process"):
        converted(state, tmp_path / "other")
    with pytest.raises(InputError, match="already has a checkpoint of update 2; the source is only at 2"):
        converted(state, run.run_dir)


def test_a_converted_state_begins_where_it_is_and_not_where_the_run_was(tmp_path):
    run = run_config(tmp_path, n_training_steps=2, log_every_n_steps=100, n_epochs=1)
    train(run)
    later = torch.load(converted(run.run_dir, tmp_path / "state.pt"))
    later["optimizer"]["step"] = 3
    torch.save(later, tmp_path / "later.pt")
    converted(tmp_path / "later.pt", run.run_dir)
    with Checkpoints(run.run_dir / "checkpoints", writing=False) as checkpoints:
        progress = checkpoints.read()[1]
    assert progress == {"n_done": 3, "has_prefix": False, "window": [], "n_skipped": 0, "to_evaluate": True}


def test_what_pytorch_finished_becomes_a_prefix(tmp_path):
    run = run_config(tmp_path, n_training_steps=2)
    train(run)
    again = run_config(tmp_path, "again", n_training_steps=2, resume=True)
    converted(converted(run.run_dir, tmp_path / "state.pt"), again.run_dir)
    assert train(again).finished
    np.testing.assert_array_equal(read_prefix(again.run_dir)[0], read_prefix(run.run_dir)[0])
    assert losses_of(again.run_dir, "dev") == losses_of(run.run_dir, "dev")


def test_a_state_before_its_first_update_begins_there(tmp_path):
    run = run_config(tmp_path, n_training_steps=1)
    train(run)
    first = torch.load(converted(run.run_dir, tmp_path / "state.pt"))
    first["optimizer"]["step"] = 0
    torch.save(first, tmp_path / "first.pt")
    again = run_config(tmp_path, "again", n_training_steps=1, resume=True)
    converted(tmp_path / "first.pt", again.run_dir)
    assert train(again).n_done == 1
    assert [point["step"] for point in metrics_of(again.run_dir, "dev")] == [1]


@pytest.mark.parametrize("removed", ["nothing", "checkpoints", "metrics.jsonl"])
def test_a_converted_state_leaves_a_better_prefix_its_place(finished, tmp_path, removed):
    config = run_config(tmp_path, n_epochs=3, max_lr=1e-2, resume=True)
    shutil.copytree(finished.run_dir, config.run_dir)
    later = torch.load(converted(config.run_dir, tmp_path / "state.pt"))
    later["optimizer"]["step"] = 9
    for array in later["encoder"].values():
        array *= 3
    torch.save(later, tmp_path / "later.pt")
    if removed == "checkpoints":
        shutil.rmtree(config.run_dir / removed)
    elif removed == "metrics.jsonl":
        (config.run_dir / removed).unlink()
    converted(tmp_path / "later.pt", config.run_dir)
    best = min(losses_of(finished.run_dir, "dev"))
    assert train(config).best_dev_loss == best
    assert all(loss > best for loss in losses_of(config.run_dir, "dev")[-2:])
    np.testing.assert_array_equal(read_prefix(config.run_dir)[0], read_prefix(finished.run_dir)[0])


@pytest.mark.parametrize("changes", [{}, {"prefix_hidden_dim": 0}], ids=["MLP", "direct"])
def test_the_newest_prefix_is_that_of_the_last_update(tmp_path, monkeypatch, changes):
    """Of update 6; the best one is that of update 4, an epoch."""
    config = run_config(tmp_path, **changes)
    stop_at(monkeypatch, 6)
    train(config)
    newest = converted(config.run_dir, tmp_path / "newest", newest=True)
    (arrays, _), (folded, header) = newest_state(config), read_prefix(newest)
    like = {"encoder": abstract_state(config, load_model(GOLDEN_BASE)).encoder}
    encoder = from_names(like, arrays, newest)["encoder"]
    np.testing.assert_allclose(folded, to_folded(encoder()), rtol=0, atol=1e-5)
    best, told = read_prefix(config.run_dir)
    assert np.abs(best - folded).max() > 1e-3
    assert header == {field: value for field, value in told.items() if field != "dev_loss"}
    same = read_prefix(converted(config.run_dir, tmp_path / "newest.npy", GOLDEN_BASE, newest=True))[0]
    np.testing.assert_array_equal(same, folded)


def test_a_newest_prefix_needs_a_run_with_a_checkpoint_and_a_sound_config(finished, tmp_path):
    with pytest.raises(InputError, match="not a run folder with a checkpoint, which --newest needs"):
        converted(GOLDEN / "forward.weight", tmp_path / "a.npy", newest=True)
    run = shutil.copytree(finished.run_dir, tmp_path / "run")
    description = run / "config.json"
    told = json.loads(description.read_text())
    description.write_text(json.dumps(told | {"base": told["base"] | {"n_layer": "many"}}))
    with pytest.raises(InputError, match=r"run: has 384 numbers per position, which do not fit .*'many'"):
        converted(run, tmp_path / "adapter", newest=True)
    description.unlink()
    with pytest.raises(InputError, match="does not say what base model it is for"):
        converted(run, tmp_path / "adapter", newest=True)
    assert converted(run, tmp_path / "adapter", GOLDEN_BASE, newest=True).is_dir()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 384), np.nan, np.float32), "holds 768 numbers that are not finite"),
        (np.ones(384, np.float32), "a prefix has axes"),
        (np.ones((2, 384), np.int32), "expected floating-point numbers, found int32"),
    ],
)
def test_a_newest_prefix_is_checked_as_a_file_is(tmp_path, array, message):
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(4, {"encoder": {"folded": array}}, {"n_done": 4})
    with pytest.raises(InputError, match=message):
        converted(tmp_path / "run", tmp_path / "a.npy", newest=True)


def test_a_training_state_is_taken_from_a_run_that_goes_on(finished, tmp_path):
    run = shutil.copytree(finished.run_dir, tmp_path / "run")
    (run / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
    next((run / "checkpoints" / "8").rglob("progress.json")).unlink()
    before = sorted(run.rglob("*"))
    converted(run, tmp_path / "state.pt")
    assert sorted(run.rglob("*")) == before


def test_a_run_that_was_stopped_within_an_epoch_goes_on_in_pytorch(tmp_path, uninterrupted, monkeypatch):
    config = run_config(tmp_path, **RINNA, n_epochs=4)
    stop_at(monkeypatch, 5)
    train(config)
    record = reference_run(tmp_path, converted(config.run_dir, tmp_path / "state.pt"), n_epochs=4)
    np.testing.assert_allclose(record.losses, uninterrupted[0][5:], rtol=LOSS)


def test_a_training_state_goes_into_an_empty_folder(tmp_path):
    state = {"encoder": ENCODER, "optimizer": {"step": 3, "exp_avg": ENCODER, "exp_avg_sq": ENCODER}}
    torch.save(state, tmp_path / "state.pt")
    (tmp_path / "run").mkdir()
    converted(tmp_path / "state.pt", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
