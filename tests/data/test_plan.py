import itertools
from pathlib import Path

import numpy as np
import pytest

from convert.errors import InputError
from jaxprefix.data.examples import Example
from jaxprefix.data.plan import UpdatePlan, epoch_order, split_examples
from tests.examples import laid_out
from tests.runs import run_config


def test_split_takes_both_ends(tmp_path):
    examples = laid_out(Example([], [i]) for i in range(10))
    train_set, dev_set = split_examples(examples, 6, 3, tmp_path)
    assert [*train_set] == [Example([], [i]) for i in range(6)]
    assert [*dev_set] == [Example([], [i]) for i in range(7, 10)]
    with pytest.raises(InputError, match="makes 10 examples"):
        split_examples(examples, 8, 3, tmp_path)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def seen_in(plan, first, last):
    """The examples that updates first … last − 1 see, in order."""
    return flat(flat(plan.micro_batches(update)) for update in range(first, last))


def make_plan(carry, n_accum_steps=3, n_training_steps=1000, n_epochs=4, n_examples=10):
    recipe = "rinna" if carry else "default"
    sizes = {"n_accum_steps": n_accum_steps, "n_epochs": n_epochs, "n_training_steps": n_training_steps}
    return UpdatePlan(run_config(Path(), batch_size=2, recipe=recipe, **sizes), n_examples)


def test_every_epoch_sees_every_example_once_in_a_fresh_order():
    plan = make_plan(carry=False)
    assert plan.n_updates == 8
    epochs = [seen_in(plan, 2 * e, 2 * e + 2) for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert [n for n in range(1, 9) if plan.ends_epoch(n)] == [2, 4, 6, 8]


def test_carried_accumulation_joins_the_next_epoch():
    plan = make_plan(carry=True)
    assert plan.n_updates == 6  # 20 micro-batches, 3 an update, the last 2 never applied
    seen = seen_in(plan, 0, 6)
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:20])
    assert [n for n in range(1, 7) if plan.ends_epoch(n)] == [1, 3, 5, 6]


@pytest.mark.parametrize(
    ("n_examples", "n_accum_steps", "n_epochs"), [(5, 2, 2), (10, 3, 4), (9, 5, 9), (9, 4, 5), (7, 3, 7)]
)
def test_carried_accumulation_is_applied_in_the_epoch_of_its_last_batch(n_examples, n_accum_steps, n_epochs):
    plan = make_plan(True, n_accum_steps, n_epochs=n_epochs, n_examples=n_examples)
    n_batches, epochs, evaluated = 0, [], {}
    for epoch in range(n_epochs):  # as the original goes through them
        for _ in range(plan.batches_per_epoch):
            n_batches += 1
            if n_batches % n_accum_steps == 0:
                epochs.append(epoch)
        evaluated.setdefault(len(epochs), []).append(epoch)
    assert [plan.epoch_of(update) for update in range(plan.n_updates)] == epochs
    for n_done in range(1, plan.n_updates + 1):
        assert plan.ends_epoch(n_done) == (n_done in evaluated)
        assert plan.epoch_of(n_done - 1) == evaluated.get(n_done, epochs[n_done - 1 :])[0]


def test_a_run_cut_short_ends_its_epoch():
    plan = make_plan(carry=False, n_training_steps=3)
    assert plan.n_updates == 3
    assert [n for n in (1, 2, 3) if plan.ends_epoch(n)] == [2, 3]


def test_order_depends_on_the_seed():
    orders = [UpdatePlan(run_config(Path(), batch_size=50, seed=seed), 50).micro_batches(0) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert np.sort(orders[2][0]).tolist() == list(range(50))


def test_the_order_of_an_epoch_is_that_of_earlier_versions_and_no_other_seeds():
    """Runs that they began are gone on with."""
    assert epoch_order(10, 42, 1).tolist() == [0, 8, 7, 4, 3, 1, 2, 9, 6, 5]
    assert epoch_order(50, 42, 1).tolist() != epoch_order(50, 43, 0).tolist()


def test_under_rinna_an_update_may_take_a_whole_epoch(tmp_path):
    assert UpdatePlan(run_config(tmp_path, recipe="rinna", n_accum_steps=4), 14).n_updates == 2
    with pytest.raises(InputError, match="--n_accum_steps 5 is more than the 4 batches of an epoch"):
        UpdatePlan(run_config(tmp_path, recipe="rinna", n_accum_steps=5), 14)
