"""The same quantities on both sides, by the same names: `Ours` in JAX, `Theirs` in the PyTorch reference.

Each starts from the same files and the same raw encoder, and takes everything else from its own earlier stages.
"""

import contextlib
import dataclasses
import functools
import io
import json
import unittest.mock
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxprefix.decode
import jaxprefix.prefix
import jaxprefix.sampling
import jaxprefix.train
import jaxprefix.update
import torch_ref.data
import torch_ref.generate
import torch_ref.prefix
import torch_ref.tokenizer
import torch_ref.train
from convert.prefix import to_folded
from jaxprefix import load_model, load_prefix, load_tokenizer
from jaxprefix.config import ConvertConfig, TrainConfig
from jaxprefix.conversion import convert
from jaxprefix.data.batches import Batch, make_padded_batch
from jaxprefix.data.examples import Chunking, Example, Examples, read_examples
from jaxprefix.data.plan import split_examples
from jaxprefix.data.rows import IGNORED, row_lengths
from jaxprefix.data.shapes import PaddedShape
from jaxprefix.inference_config import DecodeConfig
from jaxprefix.recipe import RECIPES
from jaxprefix.run.checkpoint import CHECKPOINTS, Checkpoints, from_names
from jaxprefix.sharding import make_mesh
from tests.parity.cases import (
    LOW_CLIP,
    NUCLEUS,
    SEED,
    Case,
    as_cache,
    batched,
    nucleus_logits,
    sentences,
)
from tests.parity.runs import jax_order, named, reference_run
from tests.runs import metrics_of
from torch_ref.config import generate_parser, train_parser


class Ours:
    """jaxprefix with --recipe rinna."""

    def __init__(self, case: Case, base: Path, data: Path, folder: Path):
        folder.mkdir()
        self.case, self.base, self.data, self.folder = case, base, data, folder
        steps = 2 if case.deepspeed else 1  # DeepSpeed's engine and the original's loop both step the schedule
        self.recipe = dataclasses.replace(RECIPES["rinna"], schedule_steps_per_update=steps)
        self.config = TrainConfig(
            pretrained_model_dir=str(base),
            data_filepath=data,
            save_name="run",
            output_dir=folder,
            recipe="rinna",
            bf16=case.bf16,
            packing=case.packing,
            **case.flags,
        )
        self.model, self.tokenizer = load_model(base, self.config.dtype), load_tokenizer(base)

    @functools.cached_property
    def tokens(self) -> list[list[int]]:
        return [self.tokenizer.encode(text) for text in sentences(self.data)]

    @functools.cached_property
    def chunks(self) -> list[Example]:
        return list(read_examples(self.data, Chunking(self.tokenizer, recipe=self.recipe)))

    @property
    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(batch.tokens, batch.labels) for batch in self._batches]

    @functools.cached_property
    def _batches(self) -> list[Batch]:
        sizes = self.case.n_train, self.case.n_dev
        train_set, _ = split_examples(Examples.of_lines(enumerate(self.chunks)), *sizes, self.data)
        batches = []
        for chosen in batched(jax_order(self.case.n_train, SEED, 0)):
            group = [train_set[i] for i in chosen]
            n_rows = sum(1 if example.prompt else 2 for example in group)
            batches.append(make_padded_batch(group, self.tokenizer, PaddedShape(n_rows, int(row_lengths(group).max()))))
        return batches

    @functools.cached_property
    def base_keys_values(self) -> np.ndarray:
        return as_cache(jaxprefix.prefix.base_keys_values(self.model, self.config.prefix_seq_len))

    @functools.cached_property
    def raw_encoder(self) -> dict[str, np.ndarray]:
        """Not compared: where both sides start."""
        return named(jaxprefix.prefix.PrefixEncoder(self.model.config, *self.config.encoder_sizes, SEED))

    @functools.cached_property
    def encoder(self) -> jaxprefix.prefix.Encoder:
        return jaxprefix.prefix.new_encoder(self.model, *self.config.encoder_sizes, SEED)

    @property
    def initialised(self) -> dict[str, np.ndarray]:
        return named(self.encoder)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        run = jax.jit(lambda model, tokens, prefix: model(tokens, prefix)[0])
        return np.asarray(run(self.model, self._batches[0].tokens, self.encoder()))

    @functools.cached_property
    def _loss_and_gradient(self) -> tuple[float, Any]:
        batch = jax.tree.map(lambda array: array[None], self._batches[0])
        run = jax.jit(jaxprefix.update.loss_and_gradient, static_argnums=(3, 4))
        return run(self.encoder, self.model, batch, self.recipe, make_mesh())

    @property
    def loss(self) -> float:
        return float(self._loss_and_gradient[0])

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        return named(self._loss_and_gradient[1])

    @property
    def clipped_gradients(self) -> dict[str, np.ndarray]:
        clip = jaxprefix.update.clipping(LOW_CLIP)
        return named(clip.update(self._loss_and_gradient[1], clip.init(self.encoder))[0])

    @functools.cached_property
    def run_dir(self) -> Path:
        """Not compared: the folder of the finished run."""
        with unittest.mock.patch.dict(RECIPES, rinna=self.recipe):
            jaxprefix.train.train(self.config)
        return self.config.run_dir

    @property
    def learning_rates(self) -> list[float]:
        return [point["lr"] for point in metrics_of(self.run_dir)]

    @property
    def losses(self) -> list[float]:
        return [point["loss"] for point in metrics_of(self.run_dir)]

    @property
    def folded(self) -> np.ndarray:
        with Checkpoints(self.run_dir / CHECKPOINTS, writing=False) as checkpoints:
            arrays, _ = checkpoints.read()
        trained = from_names({"encoder": self.encoder}, arrays, self.run_dir)["encoder"]
        return np.asarray(to_folded(trained()))

    @property
    def dev_losses(self) -> list[float]:
        return [point["loss"] for point in metrics_of(self.run_dir, "dev")]

    @property
    def dev_ppls(self) -> list[float]:
        return [point["ppl"] for point in metrics_of(self.run_dir, "dev")]

    @functools.cached_property
    def saved_file(self) -> Path:
        convert(ConvertConfig(self.run_dir, self.folder / "ours.weight", str(self.base)))
        return self.folder / "ours.weight"

    @property
    def saved(self) -> np.ndarray:
        """Read by the other side's reader."""
        return torch_ref.generate.load_prefix(self.saved_file, load_reference(self.case, self.base)).numpy()

    @property
    def greedy_ids(self) -> list[list[int]]:
        prefix = load_prefix(self.run_dir, self.model.config)
        prompts = [self.tokenizer.encode(prompt) for prompt in self.case.prompts]
        decode = DecodeConfig(decode_method="greedy", max_output_len=40, recipe="rinna")
        return list(jaxprefix.decode.generate_ids(self.model, self.tokenizer, prompts, prefix, decode=decode))

    @property
    def nucleus_probabilities(self) -> list[np.ndarray]:
        logits, drop = jnp.asarray(nucleus_logits()), self.recipe.drop_crossing_token
        kept = [jaxprefix.sampling.nucleus(logits, *cut, drop_crossing=drop) for cut in NUCLEUS]
        return [in_order_of_ids(*nucleus, logits.shape[1]) for nucleus in kept]


def in_order_of_ids(likeliest: jax.Array, ids: jax.Array, n_tokens: int) -> np.ndarray:
    """Return the probabilities of all tokens in a nucleus, 0 outside it."""
    probabilities = np.zeros((len(ids), n_tokens), np.float32)
    np.put_along_axis(probabilities, np.asarray(ids), np.asarray(jax.nn.softmax(likeliest)), axis=1)
    return probabilities


class Theirs:
    """The PyTorch reference, under DeepSpeed's engine if the case says so."""

    def __init__(self, case: Case, base: Path, data: Path, folder: Path, raw_encoder: Mapping[str, np.ndarray]):
        folder.mkdir()
        self.case, self.base, self.data, self.folder, self.raw_encoder = case, base, data, folder, raw_encoder
        self.model = load_reference(case, base)
        self.tokenizer = torch_ref.tokenizer.load_tokenizer(base)

    @functools.cached_property
    def tokens(self) -> list[list[int]]:
        return [self.tokenizer.encode(text) for text in sentences(self.data)]

    @functools.cached_property
    def chunks(self) -> list[torch_ref.data.Example]:
        """The original reads documents only; its batches take prompts, so the case's are put in front."""
        records = [json.loads(line) for line in self.data.read_text().splitlines()]
        examples = []
        for record in records:
            if "prompt" in record:
                pair = (self.tokenizer.encode(record["prompt"]), self.tokenizer.encode(record["completion"]))
                examples.append(torch_ref.data.Example(*pair))
            else:
                chunks = torch_ref.data.chunk_document(record["text"], self.tokenizer)
                examples += [torch_ref.data.Example([], chunk) for chunk in chunks]
        return examples

    @functools.cached_property
    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        train_set, _ = torch_ref.data.split_examples(self.chunks, self.case.n_train, self.case.n_dev)
        batches = []
        for chosen in batched(jax_order(self.case.n_train, SEED, 0)):
            inputs, labels = torch_ref.data.collate([train_set[i] for i in chosen], self.tokenizer)
            ignored = torch.where(labels == self.tokenizer.pad_id, IGNORED, labels)
            batches.append((inputs.numpy(), ignored.numpy()))
        return batches

    @functools.cached_property
    def base_keys_values(self) -> np.ndarray:
        return torch_ref.prefix.base_keys_values(self.model, 10).float().numpy()

    @functools.cached_property
    def encoder(self) -> torch_ref.prefix.PrefixEncoder:
        encoder = torch_ref.prefix.PrefixEncoder.of(self.model, 10, 10, 10)
        encoder.load_state_dict({name: torch.from_numpy(array) for name, array in self.raw_encoder.items()})
        torch_ref.prefix.fit(encoder, torch_ref.prefix.base_keys_values(self.model, 10).float())
        return encoder

    @property
    def initialised(self) -> dict[str, np.ndarray]:
        return {name: parameter.detach().numpy() for name, parameter in self.encoder.named_parameters()}

    @functools.cached_property
    def logits(self) -> np.ndarray:
        tokens = torch.from_numpy(self.batches[0][0])
        cache = torch_ref.prefix.filled_cache(self.encoder(len(tokens)).to(self.model.dtype))
        return self.model(tokens, past_key_values=cache).logits.detach().float().numpy()

    @functools.cached_property
    def loss(self) -> float:
        inputs, labels = (torch.from_numpy(array) for array in self.batches[0])
        labels = torch.where(labels == IGNORED, self.tokenizer.pad_id, labels)
        self.encoder.zero_grad()
        keys_values = self.encoder(len(inputs))
        loss = torch_ref.train.batch_loss(self.model, keys_values, (inputs, labels), self.tokenizer.pad_id)
        loss.backward()
        return loss.item()

    @functools.cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        _ = self.loss  # runs backward
        return {name: parameter.grad.numpy().copy() for name, parameter in self.encoder.named_parameters()}

    @functools.cached_property
    def clipped_gradients(self) -> dict[str, np.ndarray]:
        gradients = {name: torch.from_numpy(array.copy()) for name, array in self.gradients.items()}
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients.values()]
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, LOW_CLIP)
        return {name: parameter.grad.numpy() for name, parameter in zip(gradients, parameters, strict=True)}

    @functools.cached_property
    def _record(self) -> torch_ref.train.Record:
        initial = self.folder / "initial.pt"
        torch.save(self.encoder.state_dict(), initial)
        switches = {"--save_model": True, "--deepspeed": self.case.deepspeed, "--bf16": self.case.bf16}
        extra = [switch for switch, is_on in switches.items() if is_on]
        files = {"pretrained_model_dir": self.base, "data_filepath": self.data, "model_type": self.case.model_type}
        with contextlib.redirect_stdout(io.StringIO()):  # its log lines
            return reference_run(self.folder, initial, *extra, examples=self.chunks, **files, **self.case.flags)

    @property
    def learning_rates(self) -> list[float]:
        return self._record.rates

    @property
    def losses(self) -> list[float]:
        """A mean for each update: of its micro-batches."""
        groups = np.array(self._record.losses).reshape(-1, self.case.n_accum_steps)
        return groups.mean(axis=1).tolist()

    @property
    def folded(self) -> np.ndarray:
        return self._record.encoder.folded().detach().float().numpy()

    @property
    def dev_losses(self) -> list[float]:
        return [monitor for monitor, _ in self._record.dev]

    @property
    def dev_ppls(self) -> list[float]:
        return [ppl for _, ppl in self._record.dev]

    @property
    def saved_file(self) -> Path:
        _ = self._record  # trains
        return next(self.folder.glob("reference_prefix_encoder.*.best.checkpoint"))

    @property
    def saved(self) -> np.ndarray:
        """Read by the other side's reader."""
        return as_cache(load_prefix(self.saved_file, load_model(self.base).config))

    @functools.cached_property
    def greedy_ids(self) -> list[list[int]]:
        prefix = torch_ref.generate.load_prefix(self.saved_file, self.model)
        flags = ["--decode_method", "greedy", "--max_output_len", "40", "--pretrained_model_dir", str(self.base)]
        flags += ["--model_type", self.case.model_type]
        parsed = generate_parser().parse_args(flags)
        prompts = [self.tokenizer.encode(prompt) or [self.tokenizer.bos_id] for prompt in self.case.prompts]
        eos_id = self.tokenizer.eos_id
        return [torch_ref.generate.generate_ids(self.model, prompt, prefix, eos_id, parsed) for prompt in prompts]

    @property
    def nucleus_probabilities(self) -> list[np.ndarray]:
        logits = torch.from_numpy(nucleus_logits())
        return [torch_ref.generate.nucleus_probabilities(logits, *cut).numpy() for cut in NUCLEUS]


def load_reference(case: Case, base: Path) -> Any:
    """transformers' model, in the type that the case trains in."""
    flags = ["--pretrained_model_dir", str(base), "--model_type", case.model_type]
    parsed = train_parser().parse_args([*flags, "--data_filepath", "unused", "--save_name", "unused"])
    return torch_ref.train.load_base(parsed, torch.bfloat16 if case.bf16 else torch.float32)
