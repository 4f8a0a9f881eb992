import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprefix.loss
from jaxprefix.data.rows import IGNORED
from jaxprefix.loss import CPU_BLOCK, _in_chunks, next_token_loss
from tests.arrays import normals
from tests.tolerances import FUNCTION, HALF_GRADIENT


@pytest.fixture
def batch():
    """Hidden states [3, 10, 8], a head of 50 rows, labels of which some are ignored."""
    hidden, head = normals((3, 10, 8), (50, 8))
    labels = np.random.default_rng(1).integers(0, 50, (3, 10))
    labels[0, 3:] = labels[:, 8:] = IGNORED
    return 3 * hidden, head, jnp.asarray(labels)


@jax.default_matmul_precision("highest")  # no TF32 on a GPU
def plain_loss(hidden, head, labels):
    log_probabilities = jax.nn.log_softmax(hidden @ head.T)
    chosen = jnp.take_along_axis(log_probabilities, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen, where=labels != IGNORED)


@pytest.mark.parametrize("chunk", [4, 2048])
@pytest.mark.parametrize("block", [7, 25, 50, 2048, "as on a GPU"])
def test_chunks_and_blocks_give_the_plain_loss_and_gradient(batch, chunk, block, monkeypatch, request):
    if block == "as on a GPU":
        request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr(jaxprefix.loss, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(jaxprefix.loss, "CPU_BLOCK", block)
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain_loss))(*batch)
    loss, gradient = jax.jit(jax.value_and_grad(lambda hidden: next_token_loss(hidden, *batch[1:])))(batch[0])
    np.testing.assert_allclose(loss, expected, rtol=FUNCTION)
    np.testing.assert_allclose(gradient, expected_gradient, atol=FUNCTION * float(abs(expected_gradient).max()))
    np.testing.assert_allclose(next_token_loss(*batch), expected, rtol=FUNCTION)


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_a_cpu_skips_chunks_without_a_label_and_a_gpu_never_asks_the_host(batch, on_a_gpu, request):
    if on_a_gpu:
        request.getfixturevalue("as_on_a_gpu")
    program = str(jax.make_jaxpr(jax.grad(lambda hidden: next_token_loss(hidden, *batch[1:])))(batch[0]))
    assert ("cond[" in program) != on_a_gpu


def test_without_a_gradient_the_head_is_multiplied_one_time_fewer(batch):
    hidden, head, labels = batch
    loss, gradient = (
        str(jax.make_jaxpr(function)(hidden, head, labels)).count("dot_general")
        for function in (next_token_loss, jax.grad(next_token_loss))
    )
    assert (loss, gradient) == (2, 3), "logits, those of the labels; and the head's rows by their probabilities"


@pytest.mark.parametrize(("n_devices", "n_chunks"), [(1, 16), (4, 4), (99, 1)])
def test_chunks_are_of_so_many_tokens_a_device(monkeypatch, n_devices, n_chunks):
    monkeypatch.setattr(jaxprefix.loss, "CHUNK_TOKENS", 32)
    hidden, labels = jnp.zeros((8, 64, 4)), jnp.zeros((8, 64), jnp.int32)
    of_hidden, of_labels = _in_chunks(hidden, labels, n_devices)
    assert len(of_hidden) == len(of_labels) == n_chunks


def test_no_chunk_is_padding_alone():
    """Rows that are many and short: as many chunks as 2048 tokens go in would be a third more than they fill."""
    hidden, labels = _in_chunks(jnp.zeros((1024, 65, 1)), jnp.zeros((1024, 65), jnp.int32), 1)
    assert len(hidden) == len(labels) == 22
    assert (labels[-1] != IGNORED).any()


def test_logits_far_apart_do_not_overflow(batch, monkeypatch):
    monkeypatch.setattr(jaxprefix.loss, "CPU_BLOCK", 7)
    hidden, head, labels = batch
    np.testing.assert_allclose(
        next_token_loss(99 * hidden, head, labels), plain_loss(99 * hidden, head, labels), rtol=FUNCTION
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_in_half_precision_are_as_exact_as_its_roundoff(batch, dtype):
    """Even where what comes next is all but certain, so that little is left when its row of the head is taken away."""
    _, head, labels = batch
    head = (4 * head / jnp.linalg.norm(head, axis=-1, keepdims=True)).astype(dtype)
    hidden = head[labels]
    ours = jax.grad(lambda hidden: next_token_loss(hidden, head, labels))(hidden)
    exact = jax.grad(plain_loss)(hidden.astype(jnp.float32), head.astype(jnp.float32), labels)
    strayed = jnp.linalg.norm(ours.astype(jnp.float32) - exact)
    assert strayed < HALF_GRADIENT * jnp.finfo(dtype).eps * jnp.linalg.norm(exact)


def test_a_gradient_in_half_precision_may_be_scaled_beyond_its_largest_number(batch):
    """As a loss scale does, which keeps small gradients from vanishing."""
    hidden, head, labels = batch
    hidden, scale = hidden.astype(jnp.float16), 2.0**17
    gradients = [jax.grad(lambda x, f=f: f * next_token_loss(x, 1e-3 * head, labels))(hidden) for f in (1, scale)]
    np.testing.assert_array_equal(gradients[1], gradients[0].astype(jnp.float32) * scale)
    assert jnp.isfinite(gradients[1]).all()


def test_logits_far_below_zero_do_not_vanish():
    loss = next_token_loss(jnp.full((1, 3, 2), -99.0), jnp.ones((50, 2)), jnp.zeros((1, 3), jnp.int32))
    np.testing.assert_allclose(loss, 3 * np.log(50), rtol=FUNCTION)


def test_a_head_in_half_precision_is_not_copied_to_float32_as_a_whole(user_options):
    hidden, head = jnp.zeros((2, 4, 64), jnp.bfloat16), jnp.zeros((6 * CPU_BLOCK, 64), jnp.bfloat16)
    compiled = jax.jit(jax.grad(lambda hidden, *rest: next_token_loss(hidden, *rest))).lower(
        hidden, head, jnp.zeros((2, 4), jnp.int32)
    )
    assert compiled.compile(user_options).memory_analysis().temp_size_in_bytes < 4 * head.size
