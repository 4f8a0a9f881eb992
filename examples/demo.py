"""Train a prefix that makes a small Japanese model end every sentence with 😃, and show that it does.

Runs on the CPU in about two minutes: `make demo`, or `python examples/demo.py`.
"""

import json
import sys
import time
from pathlib import Path

import jaxprefix
from jaxprefix.config import TrainConfig
from jaxprefix.machine.screen import escape_unknown
from jaxprefix.suffix_rate import suffix_rate
from jaxprefix.train import train

DATA = Path(__file__).resolve().parent.parent / "data"
PROMPTS = (DATA / "prompts.txt").read_text(encoding="utf-8").splitlines()
"""Beginnings of texts that are not in the training data."""


def main() -> None:
    """Train, compare, measure, and say what to try next."""
    escape_unknown(sys.stdout)
    started = time.monotonic()
    config = TrainConfig(
        pretrained_model_dir=str(DATA / "small_base"),
        data_filepath=DATA / "sample_data.jsonl",
        save_name="demo",
        train_data_size=400,
        dev_data_size=20,
        n_epochs=4,
        max_lr=2e-2,
        log_every_n_steps=50,
        overwrite=True,
    )
    if not train(config).finished:
        return

    model = jaxprefix.load_model(config.pretrained_model_dir)
    tokenizer = jaxprefix.load_tokenizer(config.pretrained_model_dir)
    prefix = jaxprefix.load_prefix(config.run_dir, model.config, tokenizer)
    report: dict[str, float] = {}
    for name, trained in (("without", None), ("with", prefix)):
        texts = jaxprefix.generate(
            model, tokenizer, PROMPTS * 3, prefix=trained, seed=config.seed, batch_size=len(PROMPTS), max_output_len=48
        )
        found = suffix_rate(texts, config.suffix)
        report |= {f"{measure}_{name}": value for measure, value in found.items()}
        print(f"\n--- {name} prefix: {found['suffix_rate']:.1%} of {found['sentences']} sentences end with 😃")
        print("\n".join(prompt + text for prompt, text in zip(PROMPTS[:6], texts, strict=False)))

    metrics = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    dev_losses = [point["loss"] for point in metrics if point["split"] == "dev"]
    seconds = round(time.monotonic() - started, 1)
    report |= {"dev_loss_first": dev_losses[0], "dev_loss_best": min(dev_losses), "seconds": seconds}
    (config.run_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    command, base = ".venv/bin/jaxprefix", "--pretrained_model_dir data/small_base"
    with_prefix = f"{base} --prefix_checkpoint_path {config.run_dir}"
    print(f"\n{config.run_dir / 'report.json'}: {json.dumps(report)}\n\nTry next:")
    print(f"  {command} generate {with_prefix} --compare")
    print(f"  {command} evaluate {with_prefix} --prompt_file data/prompts.txt")
    print(f"  {command} train {base} --data_filepath data/sample_data.jsonl --save_name mine \\")
    print("      --suffix '！！' --train_data_size 400 --n_epochs 4 --max_lr 2e-2")


if __name__ == "__main__":
    main()
