"""The reference generates: its prompt loop, positions and nucleus, quirks included."""

import json
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from tests.base_folders import GOLDEN, GOLDEN_BASE
from torch_ref import generate
from torch_ref.config import generate_parser
from torch_ref.generate import choose_token
from torch_ref.models import load_base


def test_nucleus_drops_the_crossing_token():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    np.testing.assert_allclose(generate.nucleus_probabilities(logits, 0, 0.7), [[1, 0, 0]])
    np.testing.assert_allclose(generate.nucleus_probabilities(logits, 50, 0.0), [[0.5, 0.3, 0.2]], rtol=1e-6)


def positions_given(folder, max_output_len=3, prompt=(5, 6, 7)):
    """The position ids of every call of a base model that generates behind a prefix of four."""
    flags = ["--pretrained_model_dir", str(folder), "--decode_method", "greedy"]
    flags += ["--max_output_len", str(max_output_len), "--model_type", "gpt" if "gpt2" in folder.name else "gpt-neox"]
    parsed = generate_parser().parse_args(flags)
    base = load_base(parsed)
    heads = base.config.num_attention_heads
    prefix = torch.zeros(2 * base.config.num_hidden_layers, 1, heads, 4, base.config.hidden_size // heads)
    with patch.object(base, "forward", wraps=base.forward) as forward:
        generate.generate_ids(base, prompt, prefix, -1, parsed)
    return [call.kwargs.get("position_ids") for call in forward.call_args_list]


def test_gpt2_positions_start_at_zero_and_skip_one(gpt2_folder):
    assert [positions.tolist() for positions in positions_given(gpt2_folder)] == [[[0, 1, 2]], [[4]], [[5]]]


def test_gpt_neox_counts_its_cache():
    assert positions_given(GOLDEN_BASE) == [None] * 3


def test_prompt_loop(reference_tokenizer, monkeypatch, capsys):
    golden = json.loads((GOLDEN / "forward.greedy.json").read_text())
    monkeypatch.setattr("builtins.input", Mock(side_effect=[*golden, *[EOFError] * 3]))
    weight = str(GOLDEN / "forward.weight")
    flags = ["--pretrained_model_dir", str(GOLDEN_BASE), "--prefix_checkpoint_path", weight]
    generate.main([*flags, "--decode_method", "greedy", "--max_output_len", "5"])
    assert capsys.readouterr().out.splitlines() == [
        p + reference_tokenizer.decode(ids[:5]) for p, (ids, _) in golden.items()
    ]
    with pytest.raises(ValueError, match=r"forward.weight: has 10 positions, not 3"):
        generate.main([*flags, "--prefix_seq_len", "3"])
    with pytest.raises(ValueError, match="is gpt_neox, not --model_type gpt"):
        generate.main([*flags, "--model_type", "gpt"])


@pytest.mark.parametrize(("method", "ids"), [("greedy", {1}), ("nucleus", {1, 2}), ("sample", {0, 1, 2})])
def test_a_decoding_method_chooses_from_what_it_leaves(method, ids):
    torch.manual_seed(0)
    flags = ["--decode_method", method, "--top_k", "2", "--top_p", "0"]
    flags = generate_parser().parse_args(["--pretrained_model_dir", "a", *flags])
    logits = torch.tensor([[0.2, 0.45, 0.35]]).log().expand(200, -1)
    assert set(choose_token(logits, flags).flatten().tolist()) == ids


def test_an_empty_prompt_begins_with_bos(monkeypatch):
    seen = []
    monkeypatch.setattr("builtins.input", Mock(side_effect=["", EOFError]))
    monkeypatch.setattr(generate, "generate_ids", lambda base, ids, *_: seen.append(ids) or [])
    generate.main(["--pretrained_model_dir", str(GOLDEN_BASE)])
    assert seen == [[1]]
