"""PEFT and jaxprefix read each other's adapters, and compute the same with them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model

from jaxprefix import load_prefix
from jaxprefix.decode import generate_ids
from jaxprefix.inference_config import DecodeConfig
from jaxprefix.prefix import save_prefix
from tests.arrays import random_prefix
from tests.tolerances import MODEL

# PEFT hands transformers an attention mask in a way that will change; its config checks look for the hub.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TOKENS = np.random.default_rng(7).integers(4, 440, (2, 11))


def reference_of(base_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)


@torch.no_grad()
def logits_of(peft_model) -> np.ndarray:
    return peft_model.eval()(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


def greedy_ids(peft_model, tokenizer) -> list[list[int]]:
    """PEFT's continuation of every row, cut at the end token."""
    tokens = torch.from_numpy(TOKENS)
    made = peft_model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=30,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    rows = made[:, TOKENS.shape[1] :].tolist()
    return [row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row for row in rows]


def test_peft_loads_our_adapter(base_folder, model, tokenizer, tmp_path):
    prefix = random_prefix(model.config, seed=3)
    save_prefix(tmp_path / "prefix", prefix, model.config, tokenizer)
    peft_model = PeftModel.from_pretrained(reference_of(base_folder), tmp_path / "prefix")
    np.testing.assert_allclose(model(jnp.asarray(TOKENS), prefix)[0], logits_of(peft_model), rtol=0, atol=MODEL)
    decode = DecodeConfig(decode_method="greedy", max_output_len=30)
    ours = list(generate_ids(model, tokenizer, TOKENS.tolist(), prefix, seed=0, batch_size=2, decode=decode))
    assert ours == greedy_ids(peft_model, tokenizer)
    without = list(generate_ids(model, tokenizer, TOKENS.tolist(), None, seed=0, batch_size=2, decode=decode))
    assert ours != without


@pytest.mark.parametrize("projection", [False, True])
def test_we_load_an_adapter_that_peft_trained(base_folder, model, tokenizer, tmp_path, projection):
    torch.manual_seed(3)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, prefix_projection=projection)
    peft_model = get_peft_model(reference_of(base_folder), config)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss = peft_model(input_ids=torch.from_numpy(TOKENS), labels=torch.from_numpy(TOKENS)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    peft_model.save_pretrained(tmp_path)
    prefix = load_prefix(tmp_path, model.config, tokenizer)
    np.testing.assert_allclose(model(jnp.asarray(TOKENS), prefix)[0], logits_of(peft_model), rtol=0, atol=MODEL)
