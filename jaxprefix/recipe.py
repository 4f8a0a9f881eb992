"""Where this package and the original differ: the recipes that --recipe chooses from."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Whether to repeat the original's surprising behaviour: a field for each difference."""

    drop_document_tails: bool = False
    """Drop the chunk that is left when a document ends."""
    keep_long_sentences: bool = False
    """Keep a sentence longer than max_seq_len whole, instead of splitting it into even pieces."""
    keep_blank_sentences: bool = False
    """Treat blank lines of a document as sentences."""
    keep_line_ends: bool = False
    """Begin a document's first chunk with a newline and keep white space at line ends, which changes the tokens unless
    the tokenizer normalises it away."""
    schedule_steps_per_update: int = 1
    """Steps of the learning-rate schedule per update; the original's is stepped twice under DeepSpeed."""
    decay_over_requested_steps: bool = False
    """Decay to 0 over n_training_steps even if n_epochs ends earlier; else over the run's updates, not below min_lr."""
    average_batch_means: bool = False
    """Average the means of batches (accumulation, dev loss, dev ppl), instead of weighting by tokens."""
    carry_accumulation: bool = False
    """Let an unfinished accumulation group at the end of an epoch join the next epoch's first update."""
    drop_crossing_token: bool = False
    """Nucleus sampling drops the token whose cumulative probability crosses top_p."""
    restart_gpt2_positions: bool = False
    """GPT-2's generation numbers the prompt from 0 instead of P, and skips one number after it."""

    @property
    def packs_dev(self) -> bool:
        """Whether dev batches may be packed: a mean of batches needs the original's batches."""
        return not self.average_batch_means


RECIPES = {
    "default": Recipe(),
    "rinna": Recipe(
        drop_document_tails=True,
        keep_long_sentences=True,
        keep_blank_sentences=True,
        keep_line_ends=True,
        schedule_steps_per_update=2,
        decay_over_requested_steps=True,
        average_batch_means=True,
        carry_accumulation=True,
        drop_crossing_token=True,
        restart_gpt2_positions=True,
    ),
}
RecipeName = Literal["default", "rinna"]
