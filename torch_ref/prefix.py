"""The prefix encoder, its 200 fitting steps, and the tensor that is saved."""

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

FITTING_STEPS = 200


class PrefixEncoder(nn.Module):
    """Embedding → linear → tanh → linear, reshaped to the past keys and values of every layer."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, seq_len: int, input_dim: int, hidden_dim: int):
        super().__init__()
        self.n_layer, self.n_head, self.head_dim = n_layer, n_head, n_embd // n_head
        self.prefix_wte = nn.Embedding(seq_len, input_dim)
        self.prefix_mlp = nn.Sequential(
            nn.Linear(input_dim, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, n_layer * 2 * n_embd)
        )

    @classmethod
    def of(cls, base: PreTrainedModel, seq_len: int, input_dim: int, hidden_dim: int) -> "PrefixEncoder":
        """Make the encoder for a base model."""
        config = base.config
        layers_heads_embd = (config.num_hidden_layers, config.num_attention_heads, config.hidden_size)
        return cls(*layers_heads_embd, seq_len, input_dim, hidden_dim)

    def folded(self) -> torch.Tensor:
        """Return [P, L·2·N·H], the tensor that is saved; it still requires grad."""
        return self.prefix_mlp(self.prefix_wte.weight)

    def forward(self, batch_size: int) -> torch.Tensor:
        """Return [L·2, batch, N, P, H]; index 2·i is layer i's key, 2·i + 1 its value.

        The MLP runs for every row of the batch, as the original's does.
        """
        rows = torch.arange(self.prefix_wte.num_embeddings, device=self.prefix_wte.weight.device)
        return to_rows(self.prefix_mlp(self.prefix_wte(rows.expand(batch_size, -1))), self.n_layer, self.n_head)


def to_rows(folded: torch.Tensor, n_layer: int, n_head: int) -> torch.Tensor:
    """Turn [batch, P, L·2·N·H] into [L·2, batch, N, P, H]."""
    batch_size, seq_len, _ = folded.shape
    return folded.view(batch_size, seq_len, 2 * n_layer, n_head, -1).permute(2, 0, 3, 1, 4)


def filled_cache(keys_values: torch.Tensor) -> DynamicCache:
    """Return keys and values [L·2, batch, N, P, H] as transformers' cache."""
    cache = DynamicCache()
    for layer in range(len(keys_values) // 2):
        cache.update(keys_values[2 * layer], keys_values[2 * layer + 1], layer)
    return cache


@torch.no_grad()
def base_keys_values(base: PreTrainedModel, seq_len: int) -> torch.Tensor:
    """Return the base model's keys (after rotary) and values [L·2, 1, N, P, H] on token ids 0 … P−1."""
    cache = base(torch.arange(seq_len, device=base.device)[None], use_cache=True).past_key_values
    return torch.stack([part for layer in cache.layers for part in (layer.keys, layer.values)])


def parameter_groups(encoder: nn.Module, weight_decay: float) -> list[dict]:
    """Split the parameters into weights, which decay, and biases, which do not."""
    named = list(encoder.named_parameters())
    return [
        {"params": [p for name, p in named if "bias" not in name], "weight_decay": weight_decay},
        {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
    ]


def fit(encoder: PrefixEncoder, target: torch.Tensor) -> None:
    """Fit the encoder to keys and values by mean squared error over all layers at once."""
    optimizer = torch.optim.AdamW(parameter_groups(encoder, 0.01), lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(FITTING_STEPS):
        torch.nn.functional.mse_loss(encoder(1), target).backward()
        optimizer.step()
        optimizer.zero_grad()  # after the last step, too: training's first gradient would be added to it
