"""What a run reads before it starts: what it is told of, and how an update's examples become micro-batches."""

import dataclasses
import re
from itertools import chain

import jax
import numpy as np
import pytest

import jaxprefix.train as train_module
from convert.errors import InputError
from jaxprefix.config import TrainConfig
from jaxprefix.data.batches import Batch
from jaxprefix.data.examples import Example, Examples
from jaxprefix.data.plan import UpdatePlan, micro_batches_of
from jaxprefix.data.rows import label_counts, row_lengths
from jaxprefix.data.shapes import packed_shapes
from jaxprefix.inputs import Inputs, batch_shapes, read_inputs, update_batches
from jaxprefix.metrics import evaluation_batches, loss_and_ppl
from jaxprefix.prefix import DirectPrefix
from jaxprefix.sharding import make_mesh
from jaxprefix.train import summary, train
from tests.arrays import random_prefix
from tests.base_folders import make_bpe_folder
from tests.examples import laid_out, write_lines
from tests.runs import losses_of, run_config
from tests.tolerances import LOSS


def skewed(n_examples: int) -> Examples:
    """Pairs of 3 to some 400 tokens, most of them short."""
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(2), np.log(400), n_examples)).astype(int)
    return laid_out(Example([5], [6] * length) for length in lengths.tolist())


def batches_of(config: TrainConfig, inputs: Inputs) -> list[Batch]:
    return [*update_batches(config, inputs, batch_shapes(config, inputs, make_mesh()), 0)]


def test_micro_batches_that_share_a_shape_are_about_equally_long(tmp_path):
    config, examples = run_config(tmp_path, packing=True, n_accum_steps=4), skewed(90)  # an epoch ends with a part
    plan, lengths = UpdatePlan(config, 90), row_lengths(examples).sum(axis=1)
    dealt, columns = micro_batches_of(config, examples, plan), np.zeros(2)
    for update in range(plan.n_updates):
        before, after = plan.micro_batches(update), dealt(update)
        assert sorted(chain(*before)) == sorted(chain(*after))
        assert len(before) == len(after)
        assert max(map(len, after)) <= config.batch_size
        columns += [max(lengths[group].sum() for group in groups) for groups in (before, after)]
    assert columns[1] < 0.8 * columns[0]
    updates = map(dealt, range(plan.n_updates))
    inputs = read_inputs(config)._replace(train_set=examples, plan=plan)
    assert batch_shapes(config, inputs, make_mesh()) == packed_shapes(examples, updates, len(jax.devices()))


@pytest.mark.parametrize("changes", [{"n_accum_steps": 1}, {"packing": False}, {"recipe": "rinna"}])
def test_micro_batches_stay_as_they_are(tmp_path, changes):
    """The recipe "rinna" averages their means, and padded ones gain nothing."""
    config = run_config(tmp_path, **{"packing": True, "n_accum_steps": 4, **changes})
    plan = UpdatePlan(config, 90)
    assert micro_batches_of(config, skewed(90), plan)(0) == plan.micro_batches(0)


def pairs_file(folder, completions):
    return write_lines(folder / "pairs.jsonl", *({"prompt": "朝の", "completion": each} for each in completions))


def test_micro_batches_of_any_kind_make_the_same_losses(tmp_path):
    data = pairs_file(tmp_path, ["市場は人で。" * (1 + 3 * (n % 7 == 0)) + "川" * (n % 5) for n in range(18)])
    runs = [
        run_config(tmp_path, name, data_filepath=data, n_accum_steps=2, packing=packing)
        for name, packing in (("packed", True), ("padded", False))
    ]
    for config in runs:
        train(config)
    packed, padded = (losses_of(config.run_dir) for config in runs)
    assert len(packed) == 4
    np.testing.assert_allclose(packed, padded, rtol=LOSS)


def told(config) -> str:
    inputs = read_inputs(config)
    return "\n".join(summary(config, inputs, DirectPrefix(random_prefix(inputs.base.config)), make_mesh()))


def test_a_runs_log_begins_with_its_folder_and_the_time(tmp_path):
    config = run_config(tmp_path)
    assert re.match(rf"run {config.run_dir}, \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d\n", told(config))


def test_examples_of_the_file_in_neither_set_are_told(tmp_path):
    config = run_config(tmp_path, data_filepath=pairs_file(tmp_path, ["川"] * 18))
    assert "data: 14 examples, 28 tokens per epoch; dev 4 examples\n" in told(config)
    fewer = dataclasses.replace(config, train_data_size=10)
    assert "data: 10 examples, 20 tokens per epoch; dev 4 examples; 4 unused\n" in told(fewer)


def test_the_end_of_text_inside_targets_is_warned_of(tmp_path):
    base = make_bpe_folder(tmp_path / "bpe")
    completions = ["a", "a<|endoftext|>", "<|endoftext|>a<|endoftext|>", "b"] * 5
    changes = {"pretrained_model_dir": str(base), "data_filepath": pairs_file(tmp_path, completions)}
    assert "WARNING: targets that hold the end-of-text token: 7;" in told(run_config(tmp_path, **changes))
    changes["data_filepath"] = pairs_file(tmp_path, ["a"] * 20)
    assert "end-of-text" not in told(run_config(tmp_path, **changes))


def test_a_suffix_matters_to_documents_alone(tmp_path):
    changes = {"suffix": " 鬱"}
    assert "it cannot be learnt" in told(run_config(tmp_path, **changes))
    assert "learnt" not in told(run_config(tmp_path, data_filepath=pairs_file(tmp_path, ["川"] * 20), **changes))


def test_it_is_told_how_many_examples_are_too_long(tmp_path):
    """Of 20 the first 14 and the last 4 are used."""
    several, one = ["川", "川" * 600, "川" * 700, "川"] * 5, ["川"] * 19 + ["川" * 700]
    for completions, line, which in (
        (several, 3, "longest of 9 examples that do not fit"),
        (one, 20, "longest row"),
    ):
        data = pairs_file(tmp_path, completions)
        told = rf"^{data}, line {line}: a prefix of 10 plus 70\d tokens \(the {which}\) exceeds"
        with pytest.raises(InputError, match=told):
            read_inputs(run_config(tmp_path, data_filepath=data))


def test_examples_that_are_too_long_can_be_left_out(tmp_path):
    rest = read_inputs(run_config(tmp_path, data_filepath=pairs_file(tmp_path, ["川", *["市"] * 20])))
    data = pairs_file(tmp_path, ["川" * 700, "川", "川" * 600, *["市"] * 20])
    inputs = read_inputs(config := run_config(tmp_path, data_filepath=data, skip_bad_lines=True))
    assert (list(inputs.train_set), list(inputs.dev_set)) == (list(rest.train_set), list(rest.dev_set))
    assert inputs.n_unused == rest.n_unused == 3
    assert f"skipped 2 example(s) of {data} as too long, first: line 1" in told(config)
    pairs_file(tmp_path, ["川"] * 9 + ["川" * 700] * 2)
    with pytest.raises(InputError, match=r"makes 9 examples, .*; skipped 2 example\(s\) .*, first: line 10$"):
        read_inputs(config)
    pairs_file(tmp_path, ["川" * 700])
    with pytest.raises(InputError, match=r"holds no example; skipped 1 example\(s\) .*, first: line 1$"):
        read_inputs(config)


def test_examples_that_just_fit_are_not_left_out(tmp_path, tokenizer):
    """Behind a prefix of 10 there are 502 positions."""
    n_prompt = len(tokenizer.encode("朝の"))
    fits = "川" * (502 - n_prompt - len(tokenizer.encode("川" * 9)) + 9)
    assert len(tokenizer.encode(fits)) == 502 - n_prompt
    data = pairs_file(tmp_path, [fits + "川", fits, *["市"] * 17])
    inputs = read_inputs(run_config(tmp_path, data_filepath=data, skip_bad_lines=True))
    assert inputs.train_set.tally.n_too_long == 1
    assert inputs.train_set.line_numbers[0] == 2


def test_a_prefix_beyond_the_positions_leaves_no_example_out(tmp_path):
    data = pairs_file(tmp_path, ["川"] * 20)
    with pytest.raises(InputError, match=r"a prefix of 512 plus \d tokens .* 512 positions"):
        read_inputs(run_config(tmp_path, data_filepath=data, skip_bad_lines=True, prefix_seq_len=512))


def test_a_packed_run_has_four_shapes_and_little_padding(tmp_path):
    config = run_config(tmp_path, n_accum_steps=2, batch_size=2, n_epochs=20, packing=True)
    inputs = read_inputs(config)
    batches = batches_of(config, inputs)
    assert len(batches) == 80
    assert len({tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches}) == 4
    padded = batches_of(dataclasses.replace(config, packing=False), inputs)
    assert sum(b.labels.size for b in batches) < 0.95 * sum(b.labels.size for b in padded)


def test_a_packed_batch_has_the_dev_loss_of_its_examples(golden_model, tokenizer, tmp_path):
    config, mesh = run_config(tmp_path, packing=True), make_mesh()
    inputs = read_inputs(config)
    batch = jax.tree.map(lambda array: array[0], batches_of(config, inputs)[0])
    examples = [inputs.train_set[number] for number in inputs.plan.micro_batches(0)[0]]
    expected = loss_and_ppl(golden_model, None, evaluation_batches(examples, tokenizer, 4, mesh), mesh)
    assert loss_and_ppl(golden_model, None, [batch], mesh) == pytest.approx(expected, rel=LOSS)


def test_an_accumulation_group_that_an_epoch_cuts_off_counts_once(tmp_path):
    for packing in (False, True):
        config = run_config(tmp_path, train_data_size=9, n_accum_steps=2, n_epochs=1, packing=packing)
        inputs = read_inputs(config)  # three micro-batches
        batches = batches_of(config, inputs)
        assert sum(batch.n_labels for batch in batches) == label_counts(inputs.train_set).sum()
        assert len(batches) == 2


def test_prompts_with_completions_make_one_row_each(tmp_path):
    config, examples = run_config(tmp_path), Examples.of_lines(enumerate([Example([5], [6, 7])] * 8))
    inputs = read_inputs(config)._replace(train_set=examples, plan=UpdatePlan(config, 8))
    assert batch_shapes(config, inputs, make_mesh()) == [(4, 3, None)]


@pytest.mark.parametrize(("n_devices", "warned"), [(8, False), (16, True)])
def test_devices_that_a_batch_does_not_fill_are_warned_of(tmp_path, monkeypatch, n_devices, warned):
    monkeypatch.setattr(train_module, "n_row_parts", lambda mesh: n_devices)
    inputs = read_inputs(config := run_config(tmp_path))
    lines = list(train_module.summary(config, inputs, DirectPrefix(random_prefix(inputs.base.config)), make_mesh()))
    message = f"rows are split over {n_devices} devices, too many for --batch_size 4 to fill"
    assert any(message in line for line in lines) == warned
