"""The PyTorch reference against the numbers of the original program (tests/golden/README.md)."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.base_folders import GOLDEN, GOLDEN_BASE
from tests.tolerances import FUNCTION, PROBABILITY
from torch_ref.config import generate_parser
from torch_ref.data import Example, collate, read_chunks
from torch_ref.generate import generate_ids, load_prefix, nucleus_probabilities
from torch_ref.prefix import PrefixEncoder, base_keys_values, filled_cache, fit
from torch_ref.tokenizer import load_tokenizer
from torch_ref.train import batch_loss

FORWARD = np.load(GOLDEN / "forward.npz")


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(GOLDEN_BASE, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch(reference_tokenizer):
    examples = [Example(*pair) for pair in json.loads((GOLDEN / "forward.batch.json").read_text())]
    return collate(examples, reference_tokenizer)


def encoder_of(reference, state: str) -> PrefixEncoder:
    encoder = PrefixEncoder.of(reference, 10, 10, 10)
    encoder.load_state_dict({name: torch.from_numpy(FORWARD[f"{state}.{name}"]) for name in encoder.state_dict()})
    return encoder


def close(found: torch.Tensor, name: str, tolerance: float = FUNCTION) -> None:
    """Compare with a golden array, relative to its largest entry if that is above 1."""
    expected = FORWARD[name]
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance * scale)


def test_a_tokenizer_of_another_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"spiece.model: missing; torch_ref reads no other tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copy(GOLDEN_BASE / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<end>"}))
    with pytest.raises(ValueError, match=r"eos_token must be a piece of spiece\.model, found '<end>'"):
        load_tokenizer(tmp_path)


def test_chunks(reference_tokenizer):
    chunks = read_chunks(GOLDEN / "documents.jsonl", reference_tokenizer)
    assert chunks == json.loads((GOLDEN / "forward.chunks.json").read_text())


def test_logits_loss_and_gradients(reference, reference_tokenizer, batch):
    encoder = encoder_of(reference, "enc")
    np.testing.assert_array_equal(batch[0].numpy(), FORWARD["input_ids"])
    cache = filled_cache(encoder(len(batch[0])))
    close(reference(batch[0], past_key_values=cache).logits[:, ::4], "logits")
    loss = batch_loss(reference, encoder(len(batch[0])), batch, reference_tokenizer.pad_id)
    close(loss, "loss")
    close(loss.exp(), "ppl")
    loss.backward()
    for name, parameter in encoder.named_parameters():
        expected = np.abs(FORWARD[f"grad.{name}"]).max()
        assert np.abs(parameter.grad.numpy() - FORWARD[f"grad.{name}"]).max() < FUNCTION * expected, name


def test_initialisation(reference):
    encoder = encoder_of(reference, "raw")
    fit(encoder, base_keys_values(reference, 10))
    for name, parameter in encoder.named_parameters():
        close(parameter, f"init.{name}")


def test_folded_weight_still_requires_grad(reference):
    folded = encoder_of(reference, "enc").folded()
    close(folded, "weight")
    assert folded.requires_grad


@pytest.mark.parametrize("with_prefix", [True, False])
def test_greedy_ids(reference, reference_tokenizer, with_prefix):
    flags = generate_parser().parse_args(
        ["--pretrained_model_dir", str(GOLDEN_BASE), "--decode_method", "greedy", "--max_output_len", "40"]
    )
    prefix = load_prefix(GOLDEN / "forward.weight", reference) if with_prefix else None
    for prompt, expected in json.loads((GOLDEN / "forward.greedy.json").read_text()).items():
        ids = reference_tokenizer.encode(prompt) or [reference_tokenizer.bos_id]
        made = generate_ids(reference, ids, prefix, reference_tokenizer.eos_id, flags)
        assert made == expected[0 if with_prefix else 1]


@pytest.mark.parametrize("name", [name for name in FORWARD if name.startswith("nuc_") and name != "nuc_logits"])
def test_nucleus_probabilities(name):
    _, top_k, top_p = name.split("_")
    close(nucleus_probabilities(torch.from_numpy(FORWARD["nuc_logits"]), int(top_k), float(top_p)), name, PROBABILITY)
