"""The frozen base model: transformers' own classes; the prefix enters as a filled cache."""

import argparse

import torch
from transformers import AutoConfig, GPT2LMHeadModel, GPTNeoXForCausalLM, PreTrainedModel

MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {"gpt-neox": GPTNeoXForCausalLM, "gpt": GPT2LMHeadModel}


def load_base(
    flags: argparse.Namespace, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load the base model with the class that `--model_type` names; raises ValueError if the folder holds another."""
    model_class = MODEL_CLASSES[flags.model_type]
    config = AutoConfig.from_pretrained(flags.pretrained_model_dir)
    if config.model_type != getattr(model_class.config_class, "model_type", None):  # transformers would only warn
        raise ValueError(f"{flags.pretrained_model_dir}: is {config.model_type}, not --model_type {flags.model_type}")
    base = model_class.from_pretrained(flags.pretrained_model_dir, config=config, dtype=dtype)
    torch.nn.Module.to(base, device)  # base.to, as transformers wraps it, has no types that mypy accepts
    return base.eval().requires_grad_(False)
