"""The parity report holds, and each of many deliberate faults fails it first at the stage that owns the fault."""

import contextlib
import dataclasses
from unittest.mock import patch

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxprefix import conversion, loop, loss, prefix, recipe, tokenizer, train, update
from jaxprefix.data import batches, rows
from jaxprefix.models import gpt_neox
from tests.parity.cases import make_files
from tests.parity.report import CASES, STAGES, compare, compare_case, differing
from tests.parity.sides import Ours, Theirs

PLAIN, DEEPSPEED = CASES[0], next(case for case in CASES if case.deepspeed)
N_UPDATES = 12  # of the runs with a fault: enough to tell
FAULTY = dataclasses.replace(PLAIN, n_training_steps=N_UPDATES)
GPT2 = dataclasses.replace(next(case for case in CASES if case.model_type == "gpt"), n_training_steps=N_UPDATES)
PAD_ID = 3  # of the golden base


@pytest.mark.parametrize(
    ("theirs", "n"), [([[1, 2], [3]], 0), ([[1, 2], [4]], 1), ([[1], [3]], 1), ([[1, 2]], 2), ([[1, 2], [3], []], 1)]
)
def test_items_that_differ_are_counted_and_so_are_those_that_one_side_lacks(theirs, n):
    ours = [[1, 2], [3]]
    assert differing(ours, theirs) == differing(theirs, ours) == n


def with_recipe(**changes):
    return patch.dict(recipe.RECIPES, rinna=dataclasses.replace(recipe.RECIPES["rinna"], **changes))


def replaced(module, name, make):
    """Put make(original) in a function's place."""
    return patch.object(module, name, make(getattr(module, name)))


def shift_of_second_row_lost(rows_of):
    return lambda *arguments: [
        (inputs, labels if index == 0 else inputs) for index, (inputs, labels) in enumerate(rows_of(*arguments))
    ]


def keys_and_values_swapped(attend):
    return lambda q, k, v, prefix, *rest: attend(q, k, v, None if prefix is None else prefix[::-1], *rest)


def gradient_of_values_lost(attend):
    def fault(q, k, v, prefix, *rest):
        stopped = None if prefix is None else prefix.at[1].set(jax.lax.stop_gradient(prefix[1]))
        return attend(q, k, v, stopped, *rest)

    return fault


def position_off_by_one_in_decoding(positions_of):
    return lambda slots, *rest: positions_of(slots, *rest) + (slots.shape[1] == 1)


def schedule_stepped(times):
    def fault(learning_rate):
        def stepped(*arguments):
            with with_recipe(schedule_steps_per_update=times):
                return learning_rate(*arguments)

        return stepped

    return fault


FAULTS = {
    "a dummy prefix before every text": (
        "tokens",
        lambda: replaced(
            tokenizer.Tokenizer,
            "encode",
            lambda encode: lambda self, text: [self.vocabulary.id_of("▁"), *encode(self, text)],
        ),
    ),
    "document tails kept": ("chunks", lambda: with_recipe(drop_document_tails=False)),
    "labels of the second row not shifted": ("batches", lambda: replaced(batches, "rows_of", shift_of_second_row_lost)),
    "rotary base": (
        "base_keys_values",
        lambda: replaced(
            gpt_neox,
            "rotary_cos_sin",
            lambda cos_sin: lambda p, config: cos_sin(p, dataclasses.replace(config, rotary_base=10500.0)),
        ),
    ),
    "layer-norm eps": (
        "base_keys_values",
        lambda: replaced(gpt_neox, "LayerNorm", lambda norm: lambda width, eps: norm(width, 100 * eps)),
    ),
    "decay on biases": (
        "initialised",
        lambda: replaced(prefix, "decays", lambda _: lambda encoder: jax.tree.map(lambda _: True, encoder)),
    ),
    "position offset missing": (
        "logits",
        lambda: replaced(gpt_neox, "positions_of", lambda _: lambda slots, *_: slots),
    ),
    "keys and values swapped": ("logits", lambda: replaced(gpt_neox, "attend", keys_and_values_swapped)),
    "loss over pad": (
        "loss",
        lambda: replaced(
            loss,
            "next_token_loss",
            lambda of: lambda h, head, labels, *n: of(h, head, jnp.where(labels == rows.IGNORED, PAD_ID, labels), *n),
        ),
    ),
    "gradient of the prefix values lost": ("gradients", lambda: replaced(gpt_neox, "attend", gradient_of_values_lost)),
    "clipped by value": ("clipped_gradients", lambda: patch.object(update.optax, "clip_by_global_norm", optax.clip)),
    "schedule stepped twice": ("learning_rates", lambda: replaced(train, "learning_rate", schedule_stepped(2))),
    "Adam's epsilon": (
        "losses",
        lambda: replaced(
            update,
            "make_optimizer",
            lambda make: lambda adamw, rate: make(adamw._replace(eps=1e-3), rate),
        ),
    ),
    "last update lost": (
        "folded",
        lambda: replaced(train.Checkpoints, "save", lambda save: lambda *a: save(*a) if a[1] < N_UPDATES else None),
    ),
    "dev loss weighted by tokens": (
        "dev_losses",
        lambda: replaced(loop, "loss_and_ppl", lambda loss_and_ppl: lambda *arguments: loss_and_ppl(*arguments[:4])),
    ),
    "saved layout": (
        "saved",
        lambda: replaced(
            conversion,
            "save_torch",
            lambda write: lambda path, folded: write(path, folded.reshape(10, -1, 2, 64)[:, :, ::-1]),
        ),
    ),
    "position off by one in decoding": (
        "greedy_ids",
        lambda: replaced(gpt_neox, "positions_of", position_off_by_one_in_decoding),
    ),
    "crossing token kept": ("nucleus_probabilities", lambda: with_recipe(drop_crossing_token=False)),
}


@contextlib.contextmanager
def injected(fault):
    """Nothing compiled outlives the fault, nor enters it."""
    jax.clear_caches()
    with fault():
        yield
    jax.clear_caches()


def reference_of(case, folder):
    """A case's files and the reference's side of it, which computes every stage once."""
    base, documents = make_files(case, folder)
    raw_encoder = Ours(case, base, documents, folder / "ours").raw_encoder
    return base, documents, Theirs(case, base, documents, folder / "theirs", raw_encoder)


def first_failure(case, reference, folder):
    base, documents, theirs = reference
    results = compare(case, Ours(case, base, documents, folder / "faulty"), theirs)
    return next((result.stage.name for result in results if not result.holds), None)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return reference_of(FAULTY, tmp_path_factory.mktemp("reference"))


@pytest.mark.usefixtures("users_compiling")
def test_every_stage_agrees(tmp_path):  # in the first case; make parity compares all
    results = list(compare_case(PLAIN, tmp_path))
    assert [result.stage for result in results] == list(STAGES)
    assert not [(result.stage.title, result.difference) for result in results if not result.holds]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_at_its_stage(fault, reference, tmp_path):
    stage, inject = FAULTS[fault]
    with injected(inject):
        assert first_failure(FAULTY, reference, tmp_path) == stage


def test_gpt2_positions_that_count_from_the_prefix_fail_in_generation(tmp_path):
    reference = reference_of(GPT2, tmp_path)
    with injected(lambda: with_recipe(restart_gpt2_positions=False)):
        assert first_failure(GPT2, reference, tmp_path) == "greedy_ids"


@pytest.mark.deepspeed
def test_a_schedule_stepped_once_fails_under_deepspeed(tmp_path):
    reference = reference_of(DEEPSPEED, tmp_path)
    with injected(lambda: replaced(train, "learning_rate", schedule_stepped(1))):
        assert first_failure(DEEPSPEED, reference, tmp_path) == "learning_rates"
