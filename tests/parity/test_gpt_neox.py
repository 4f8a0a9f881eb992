"""The JAX model against transformers' PyTorch model, prefix and gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from tests.base_folders import random_prefix
from tests.tolerances import MODEL

TOKENS = np.random.default_rng(5).integers(4, 440, (3, 20))


def torch_logits(folder, prefix: torch.Tensor | None) -> torch.Tensor:
    """Logits of transformers' model, the prefix handed over as a filled cache."""
    reference = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = None
    if prefix is not None:
        cache = transformers.DynamicCache()
        for index, layer in enumerate(prefix):
            k, v = layer.permute(0, 2, 1, 3)[:, None].expand(-1, len(TOKENS), -1, -1, -1)
            cache.update(k, v, index)
    return reference(torch.from_numpy(TOKENS), past_key_values=cache).logits


def test_logits_without_prefix(base_folder, model):
    expected = torch_logits(base_folder, None).detach().numpy()
    np.testing.assert_allclose(model(jnp.asarray(TOKENS))[0], expected, rtol=0, atol=MODEL)


def test_logits_and_gradients_with_prefix(base_folder, model):
    prefix = random_prefix(model.config)
    torch_prefix = torch.from_numpy(np.array(prefix)).requires_grad_()
    expected = torch_logits(base_folder, torch_prefix)
    expected.logsumexp(-1).mean().backward()
    logits, _ = model(jnp.asarray(TOKENS), prefix)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=MODEL)

    gradient = jax.jit(jax.grad(lambda p: jax.nn.logsumexp(model(jnp.asarray(TOKENS), p)[0], axis=-1).mean()))
    reference = torch_prefix.grad.numpy()
    np.testing.assert_allclose(gradient(prefix), reference, rtol=0, atol=MODEL * np.abs(reference).max())
