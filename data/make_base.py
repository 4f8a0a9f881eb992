"""Make the small base model from scratch: corpus → SentencePiece tokenizer → GPT-NeoX, pretrained on the CPU.

    python data/make_base.py --output_dir data/small_base

Needs the torch and dev extras, and about 20 minutes on two cores. The corpus consists of documents filled in from
`scenes.json` and of the sample documents except the last ones, which stay unseen for evaluation.
"""

import dataclasses
import io
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import tyro
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

DATA = Path(__file__).parent
SMILE = "😃"
OLDER_NAMES = {"rotary_pct": 1.0, "rotary_emb_base": 10000, "torch_dtype": "float16"}
"""What transformers 4 reads in config.json in place of what 5 writes; without these, it rotates only a quarter."""
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the small base model is made."""

    output_dir: Path = DATA / "small_base"
    """Folder of the model."""
    n_documents: int = 60_000
    """Documents to generate from the scenes."""
    sample_share: float = 0.01
    """Share of sample documents among all; with 0.08 the model knows them by heart."""
    n_held_out: int = 12
    """Sample documents at the end of the file that are left out."""
    smile_rate: float = 0.015
    """Share of documents whose writer puts a 😃 after nine out of ten sentences: known, but rare."""
    vocab_size: int = 4000
    """Pieces of the tokenizer."""
    n_layer: int = 4
    n_head: int = 6
    n_embd: int = 192
    n_steps: int = 1700
    """Updates of the pretraining."""
    batch_size: int = 32
    """Rows per update."""
    row_length: int = 96
    """Tokens per row."""
    max_lr: float = 2.5e-3
    seed: int = 0


def read_scenes(path: Path) -> list[dict]:
    """Read {"shared": slots, "scenes": [{"title", "slots", "lines": [[alternative, …], …]}, …]}.

    Slots are {"C": [c, …], "A B": [[a, b], …]}; the second form binds several names to choices that agree.
    The shared slots that a scene uses but does not define itself are added to its own.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    for scene in content["scenes"]:
        used = set(re.findall(r"\{(\w+)\}", "".join(line for lines in scene["lines"] for line in lines)))
        own = {name for names in scene["slots"] for name in names.split()}
        missing = used - own
        scene["slots"] |= {names: c for names, c in content["shared"].items() if missing & set(names.split())}
        undefined = used - {name for names in scene["slots"] for name in names.split()}
        if undefined or own - used:
            raise SystemExit(f"{path}: {scene['title']}: undefined {sorted(undefined)}, unused {sorted(own - used)}")
    return content["scenes"]


def fill_scene(scene: dict, rng: random.Random) -> list[str]:
    """Return one document's sentences: one alternative for each line, each slot filled the same way throughout."""
    values: dict[str, str] = {}
    for names, choices in scene["slots"].items():
        choice = rng.choice(choices)
        values |= zip(names.split(), [choice] if isinstance(choice, str) else choice, strict=True)
    sentences = [rng.choice(line).format_map(values) for line in scene["lines"]]
    return [sentence for sentence in sentences if sentence]


def documents(settings: Settings) -> Iterator[str]:
    """Yield the corpus: sentences separated by newlines, a few with a smile."""
    rng = random.Random(settings.seed)
    scenes = read_scenes(DATA / "scenes.json")
    samples = [
        json.loads(line)["text"] for line in (DATA / "sample_data.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    samples = samples[: len(samples) - settings.n_held_out]
    for _ in range(settings.n_documents):
        is_sample = rng.random() < settings.sample_share
        sentences = rng.choice(samples).split("\n") if is_sample else fill_scene(rng.choice(scenes), rng)
        smiles = 0.9 if rng.random() < settings.smile_rate else 0.0
        yield "\n".join(f"{s} {SMILE}" if rng.random() < smiles else s for s in sentences)


def train_tokenizer(corpus: list[str], settings: Settings) -> sentencepiece.SentencePieceProcessor:
    """Train a unigram model in rinna's style (no dummy prefix), and write the tokenizer's three files."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted({line for text in corpus for line in text.split("\n")})),
        model_writer=model,
        vocab_size=settings.vocab_size,
        character_coverage=1.0,
        add_dummy_prefix=False,
        control_symbols=["[PAD]"],
        user_defined_symbols=[SMILE],
        minloglevel=2,
    )
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    (settings.output_dir / "spiece.model").write_bytes(model.getvalue())
    for name, extra in (("special_tokens_map.json", {}), ("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})):
        (settings.output_dir / name).write_text(json.dumps(SPECIAL_TOKENS | extra, indent=2) + "\n")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def pretrain(stream: np.ndarray, vocab_size: int, settings: Settings) -> GPTNeoXForCausalLM:
    """Train on random rows of the token stream: AdamW, linear warmup, cosine decay."""
    torch.manual_seed(settings.seed)
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=settings.n_embd,
        intermediate_size=4 * settings.n_embd,
        num_hidden_layers=settings.n_layer,
        num_attention_heads=settings.n_head,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        use_parallel_residual=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPTNeoXForCausalLM(config).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.max_lr, betas=(0.9, 0.95))
    n_warmup = settings.n_steps // 25 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / n_warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * step / settings.n_steps)) / 2),
    )
    rng = np.random.default_rng(settings.seed)
    started = time.monotonic()
    for step in range(settings.n_steps):
        starts = rng.integers(0, len(stream) - settings.row_length, settings.batch_size)
        rows = torch.from_numpy(np.stack([stream[s : s + settings.row_length] for s in starts]).astype(np.int64))
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == settings.n_steps - 1:
            print(f"{time.monotonic() - started:.0f}s step {step}: loss {loss.item():.4f}", flush=True)
    return model.eval()


def main(settings: Settings) -> None:
    """Make corpus, tokenizer and model, and write the model in float16."""
    corpus = list(documents(settings))
    tokenizer = train_tokenizer(corpus, settings)
    ids = [[1, *tokenizer.encode(text), 2] for text in corpus]
    stream = np.concatenate([np.array(row, np.uint16) for row in ids])
    print(f"{len(corpus):,} documents, {len(stream):,} tokens, {tokenizer.vocab_size():,} pieces", flush=True)
    model = pretrain(stream, tokenizer.vocab_size(), settings)
    model.half().save_pretrained(settings.output_dir)
    (settings.output_dir / "generation_config.json").unlink(missing_ok=True)
    config = settings.output_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | OLDER_NAMES, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
