"""The numbers of the original program (tests/golden/README.md), stage by stage."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.prefix import read_prefix, to_folded
from jaxprefix import load_prefix
from jaxprefix.data.batches import make_padded_batch
from jaxprefix.data.examples import Chunking, Example, read_examples
from jaxprefix.data.rows import IGNORED, row_lengths
from jaxprefix.data.shapes import PaddedShape
from jaxprefix.decode import generate_ids
from jaxprefix.inference_config import DecodeConfig
from jaxprefix.loss import next_token_loss
from jaxprefix.prefix import PrefixEncoder, base_keys_values, fit
from jaxprefix.recipe import RECIPES
from jaxprefix.sampling import nucleus
from tests.base_folders import GOLDEN
from tests.parity.runs import named
from tests.parity.sides import in_order_of_ids
from tests.tolerances import FOLDED, FUNCTION, LOSS, MODEL, PROBABILITY

pytestmark = pytest.mark.usefixtures("users_compiling")
FORWARD = np.load(GOLDEN / "forward.npz")


def encoder_of(model, state: str) -> PrefixEncoder:
    """The golden encoder in the state `raw`, `init` or `enc`."""
    graph, empty = nnx.split(PrefixEncoder(model.config, 10, 10, 10, 0))
    filled = {
        path: leaf.replace(jnp.asarray(FORWARD[f"{state}.{'.'.join(path)}"])) for path, leaf in nnx.to_flat_state(empty)
    }
    return nnx.merge(graph, nnx.from_flat_state(filled))


@pytest.fixture(scope="module")
def batch(tokenizer):
    examples = [Example(*pair) for pair in json.loads((GOLDEN / "forward.batch.json").read_text())]
    n_columns = int(row_lengths(examples).max())
    return make_padded_batch(examples, tokenizer, PaddedShape(len(FORWARD["input_ids"]), n_columns))


def mean_loss(encoder, model, batch):
    hidden, _ = model.hidden(jnp.asarray(batch.tokens), encoder())
    return next_token_loss(hidden, model.head_weight, jnp.asarray(batch.labels)) / (batch.labels != IGNORED).sum()


def test_chunks_and_tokens(tokenizer):
    examples = read_examples(GOLDEN / "documents.jsonl", Chunking(tokenizer, recipe=RECIPES["rinna"]))
    assert [example.target for example in examples] == json.loads((GOLDEN / "forward.chunks.json").read_text())


def test_input_ids(batch):
    np.testing.assert_array_equal(batch.tokens, FORWARD["input_ids"])


def test_logits(golden_model, batch):
    forward = jax.jit(lambda model, tokens, encoder: model(tokens, encoder())[0])
    logits = forward(golden_model, batch.tokens, encoder_of(golden_model, "enc"))
    np.testing.assert_allclose(logits[:, ::4], FORWARD["logits"], rtol=0, atol=MODEL)


def test_loss_and_ppl(golden_model, batch):
    loss = jax.jit(mean_loss)(encoder_of(golden_model, "enc"), golden_model, batch)
    np.testing.assert_allclose(loss, FORWARD["loss"], rtol=LOSS)
    np.testing.assert_allclose(jnp.exp(loss), FORWARD["ppl"], rtol=LOSS)


def test_encoder_gradients(golden_model, batch):
    gradients = named(jax.jit(jax.grad(mean_loss))(encoder_of(golden_model, "enc"), golden_model, batch))
    assert len(gradients) == 5
    for name, gradient in gradients.items():
        expected = FORWARD[f"grad.{name}"]
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=MODEL * np.abs(expected).max(), err_msg=name)


def test_initialisation(golden_model):
    fitted = named(fit(encoder_of(golden_model, "raw"), base_keys_values(golden_model, 10)))
    for name, value in fitted.items():
        np.testing.assert_allclose(value, FORWARD[f"init.{name}"], rtol=0, atol=FUNCTION, err_msg=name)
        assert np.abs(FORWARD[f"init.{name}"] - FORWARD[f"raw.{name}"]).max() > 1e-2, "fitting moved nothing"


def test_folded_weight(golden_model):
    folded = to_folded(encoder_of(golden_model, "enc")())
    np.testing.assert_allclose(folded, FORWARD["weight"], rtol=0, atol=FOLDED)
    np.testing.assert_array_equal(read_prefix(GOLDEN / "forward.weight")[0], FORWARD["weight"])


@pytest.mark.parametrize("with_prefix", [True, False])
def test_greedy_ids(golden_model, tokenizer, with_prefix):
    golden = json.loads((GOLDEN / "forward.greedy.json").read_text())
    prefix = load_prefix(GOLDEN / "forward.weight", golden_model.config) if with_prefix else None
    prompts = [tokenizer.encode(prompt) for prompt in golden]
    decode = DecodeConfig(decode_method="greedy", max_output_len=40)
    made = list(generate_ids(golden_model, tokenizer, prompts, prefix, decode=decode))
    assert made == [ids[0 if with_prefix else 1] for ids in golden.values()]


@pytest.mark.parametrize("name", [name for name in FORWARD if name.startswith("nuc_") and name != "nuc_logits"])
def test_nucleus_probabilities(name):
    _, top_k, top_p = name.split("_")
    logits = jnp.asarray(FORWARD["nuc_logits"])
    probabilities = in_order_of_ids(*nucleus(logits, int(top_k), float(top_p), drop_crossing=True), logits.shape[1])
    np.testing.assert_allclose(probabilities, FORWARD[name], rtol=0, atol=PROBABILITY)
