"""A prefix trained on one side gives the same greedy ids on both."""

import torch

from convert.prefix import read_prefix
from jaxprefix import load_prefix
from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert
from jaxprefix.decode import generate_ids
from jaxprefix.inference_config import DecodeConfig
from jaxprefix.train import train
from tests.base_folders import GOLDEN_BASE
from tests.parity.runs import reference_run, started_encoder
from tests.runs import run_config
from torch_ref import generate as reference
from torch_ref.config import generate_parser
from torch_ref.models import load_base

PROMPTS = ("", "今日は", "猫が好き", "電車で")


def ours(prefix_path, golden_model, tokenizer):
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    decode = DecodeConfig(decode_method="greedy", max_output_len=40)
    prefix = load_prefix(prefix_path, golden_model.config)
    return list(generate_ids(golden_model, tokenizer, prompts, prefix, decode=decode))


def theirs(prefix_path, tokenizer):
    flags = ["--pretrained_model_dir", str(GOLDEN_BASE), "--decode_method", "greedy", "--max_output_len", "40"]
    parsed = generate_parser().parse_args(flags)
    base = load_base(parsed)
    prefix = reference.load_prefix(prefix_path, base)
    prompts = [tokenizer.encode(prompt) or [tokenizer.bos_id] for prompt in PROMPTS]
    return [reference.generate_ids(base, prompt, prefix, tokenizer.eos_id, parsed) for prompt in prompts]


def test_our_weight_in_the_reference(tmp_path, golden_model, tokenizer):
    config = run_config(tmp_path)
    train(config)
    convert(ConvertConfig(config.run_dir, tmp_path / "ours.weight"))
    made = ours(config.run_dir, golden_model, tokenizer)
    assert theirs(tmp_path / "ours.weight", tokenizer) == made
    assert len({tuple(ids) for ids in made}) > 1


def test_the_references_checkpoint_here(tmp_path, golden_model, tokenizer):
    torch.save(started_encoder(run_config(tmp_path)), tmp_path / "encoder.pt")
    reference_run(tmp_path, tmp_path / "encoder.pt", "--save_model", n_training_steps=8)
    saved = next(tmp_path.glob("*.best.checkpoint"))
    assert ours(saved, golden_model, tokenizer) == theirs(saved, tokenizer)
    assert read_prefix(saved)[0].shape == (10, 3 * 2 * 64)
