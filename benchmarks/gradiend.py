"""How fast GRADIEND is, compared with gradiend 0.2.3 and with what the hardware allows.

    python benchmarks/gradiend.py [part …] [--quick] [--threads 1]

Everything that is compared runs in turns in one process, on the same model, data, batches and padding, and both
sides get tokens. Processor time is counted, by default of one thread: unlike elapsed time, it does not grow when other
programs use the processor too. Ratios above 1 mean that the reference takes longer. Memory is measured in a separate
process for each side.

HF_ERASURE_TEST_ASSETS may name a folder with `models/story-mlm`, a model that knows names of both genders; without it
this script trains a small one.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from hf_erasure.fitting.gradiend import GradientReader, PairBatch, PairSet, neutral_batches
from hf_erasure.fitting.gradiend.gradients import encoded
from hf_erasure.fitting.gradiend.sentences import pairs_from_templates
from hf_erasure.gradiend import ClosedFormEstimator, FeatureNeuron

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()
logging.disable(logging.INFO)
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

LR = 1e-4
SIZES = [(4, 256, 8192), (6, 512, 8192), (4, 256, 30522)]  # layers, width, words; BERT has 30522 words
BASE = (12, 768, 30522)  # as BERT-base; only for memory
BATCHES = [(8, 32), (8, 16), (32, 32)]  # rows, tokens; 8 and 32 rows are the defaults of the two packages
FLOOR = 26  # n-vectors that a step in float32 reads and writes when everything is fused
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LEARNING_RATES, PATIENCE = (1e-4, 3e-4, 1e-3), 12  # a run may take PATIENCE times the closed form's time

PARTS = ("neuron", "step", "memory", "fit", "encode")

Size = tuple[int, int, int]
Case = tuple[int, int]


def reference(module: str) -> Any:
    """A module of the reference package; this file has its name and would hide it while its folder is on the path."""
    here = Path(__file__).parent.resolve()
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    return importlib.import_module(f"gradiend.{module}".rstrip("."))


# ---- model and data --------------------------------------------------------------------------------------------------


def build(layers: int, width: int, words: int) -> Any:
    """A masked language model with random weights, in eval mode, which both packages use."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )  # fmt: skip
    return hf.BertForMaskedLM(config).eval()


def make_batches(count: int, rows: int, length: int) -> list[PairBatch]:
    """Batches of random tokens, with classes in turns; one token in each row is predicted."""
    generator, found = torch.Generator().manual_seed(0), []
    for number in range(count):
        ids = torch.randint(10, 8000, (rows, length), generator=generator)
        at = torch.randint(1, length - 1, (rows,), generator=generator)
        ids[torch.arange(rows), at] = 4
        words = torch.full((rows,), 5 + number % 2), torch.full((rows,), 6 - number % 2)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append(PairBatch(inputs, torch.arange(rows), at, *words, label=number % 2, other=1 - number % 2))
    return found


def reference_item(batch: PairBatch) -> dict[str, Any]:
    """A batch in the form of the reference's data set, after tokenising and stacking."""
    item: dict[str, Any] = {}
    for side, tokens in (("factual", batch.factual), ("alternative", batch.counterfactual)):
        labels = torch.full_like(batch.inputs["input_ids"], -100)
        labels[batch.rows, batch.positions] = tokens
        item[side] = {**batch.inputs, "labels": labels}
    return item | {"label": 1 - 2 * int(batch.label or 0)}


class Reference:
    """The reference's model, gradients and training step, put together as its `Trainer.train` does by default."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        kind = reference("trainer.text.prediction.model_with_gradiend").TextPredictionModelWithGradiend
        neuron = reference("model.core.backbone").build_gradiend_from_base_model(
            model, "benchmark", device_encoder=torch.device("cpu"), device_decoder=torch.device("cpu")
        )
        self.model = kind(model, neuron, tokenizer or _Named("bert"))
        self.neuron, self.criterion = neuron, torch.nn.MSELoss()
        self.names: list[str] = list(neuron.param_map)
        self.optimizer = torch.optim.AdamW(list(neuron.parameters()), lr=LR, weight_decay=1e-2, eps=1e-8)

    def rows(self, batches: Sequence[PairBatch]) -> Iterator[dict[str, Any]]:
        """Source and target of one batch after another, endlessly."""
        dataset = reference("trainer.core.dataset").GradientTrainingDataset(
            [reference_item(batch) for batch in batches],
            self.model.gradient_creator.forward,
            source="factual",
            target="diff",
            device=torch.device("cpu"),
        )
        while True:
            yield from DataLoader(dataset, batch_size=1, shuffle=False)

    def step(self, row: Mapping[str, Any]) -> float:
        """The body of the reference's training loop, without its callbacks."""
        decoded, _ = self.neuron(row["source"], return_encoded=True)
        loss = self.criterion(decoded, row["target"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        _ = self.neuron.encoder_norm, self.neuron.decoder_norm
        return loss.item()


@dataclass
class _Named:
    """Takes the place of a tokenizer, since tokens are given: the reference only asks for its kind."""

    name_or_path: str
    mask_token: str = "[MASK]"
    mask_token_id: int = 4
    pad_token_id: int = 0


def reader_of(model: Any, names: Sequence[str]) -> GradientReader:
    """A reader of our gradients, of the same parameters as the reference's."""
    own = dict(model.named_parameters())
    return GradientReader(model, {name: own[name] for name in names})


def entries(reader: GradientReader) -> int:
    """The number n of weights."""
    return sum(parameter.numel() for parameter in reader.parameters.values())


def neuron_of(reader: GradientReader, lr: float = LR) -> FeatureNeuron:
    """Our neuron for these gradients."""
    return FeatureNeuron({name: p.shape for name, p in reader.parameters.items()}, lr=lr)


def named(size: Size) -> str:
    """A model's size for the tables."""
    return f"{size[0]} x {size[1]}, {size[2]} words"


# ---- times -----------------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], object]) -> float:
    """Processor time of a step, in seconds."""
    start = time.process_time()
    step()
    return time.process_time() - start


def in_turns(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in every round; all run in turns, and a first round does not count."""
    rounds = [{name: seconds(step) for name, step in steps.items()} for _ in range(repeats + 1)]
    return {name: [taken[name] for taken in rounds[1:]] for name in steps}


def ratio(times: Mapping[str, list[float]], name: str = "ours") -> float:
    """The median over rounds of the reference's time in multiples of ours."""
    return statistics.median(theirs / ours for theirs, ours in zip(times["reference"], times[name], strict=True))


def verdict(value: float, target: float, *, most: bool = False) -> str:
    """Whether a target is met."""
    met = value <= target if most else value >= target
    return f"{'met' if met else 'MISSED'} ({'at most' if most else 'at least'} {target:g})"


def report_neuron(size: Size, repeats: int) -> None:
    """Print the neuron alone: time, passes over n, and bytes per second."""
    model = build(*size)
    theirs = Reference(model)
    reader = reader_of(model, theirs.names)
    ours, n = neuron_of(reader), entries(reader)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(n, generator=generator) * 1e-3 for _ in range(2)]
    source, target = ({k: v.view(p.shape) for (k, p), v in zip(
        reader.parameters.items(), vector.split([q.numel() for q in reader.parameters.values()]), strict=True
    )} for vector in drawn)  # fmt: skip
    row = {"source": drawn[0][None], "target": drawn[1][None]}
    out = torch.empty(n)
    steps: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.step(source, target),
        "reference": lambda: theirs.step(row),
        "sum": lambda: torch.add(*drawn, out=out),
    }
    times = in_turns(steps, repeats)
    taken = {name: statistics.median(found) for name, found in times.items()}
    passes = {name: counted(steps[name], n) for name in ("ours", "reference")}
    print(f"  {named(size)}, n = {n / 1e6:.1f} M: ours {taken['ours'] * 1e3:.0f} ms, reference ", end="")
    print(f"{taken['reference'] * 1e3:.0f} ms: {ratio(times):.2f} x, {verdict(ratio(times), 4)}")
    moved = FLOOR * 4 * n / 1e9
    free = 3 * 4 * n / taken["sum"] / 1e9
    for name in ("ours", "reference"):
        print(
            f"    {name:>9}: {passes[name]:5.1f} passes over n in all operations; {moved / taken[name]:5.2f} GB/s of "
            f"the floor's {FLOOR}, {moved / taken[name] / free:4.0%} of a plain sum's {free:.2f} GB/s",
            flush=True,
        )


class _Passes(TorchDispatchMode):
    """Counts the bytes that operations read and write; views count as none."""

    WRITING = ("copy_", "zero_", "fill_", "zeros_like", "ones_like", "zeros", "empty", "empty_like", "new_zeros")

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema, name = func._schema, func._schema.name.split("::")[1]
        infos = {argument.name: argument.alias_info for argument in schema.arguments}
        given = dict(zip(infos, args, strict=False)) | (kwargs or {})
        if any(info is not None and not info.is_write for info in infos.values()) or name.startswith("empty"):
            return result  # a view, or memory that is not written yet
        seen: set[int] = set()
        for key, value in given.items():
            written = infos[key] is not None and not (name == "_fused_adamw_" and key == "grads")
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor):
                    read = id(tensor) not in seen and key != "out" and not (written and name in self.WRITING)
                    self.entries += tensor.numel() * (read + written)
                    seen.add(id(tensor))
        if not any(info is not None for info in infos.values()):
            made = result if isinstance(result, (list, tuple)) else [result]
            self.entries += sum(tensor.numel() for tensor in made if isinstance(tensor, Tensor))
        return result


def counted(step: Callable[[], object], n: int) -> float:
    """Reads and writes of a step in multiples of n."""
    with _Passes() as passes:
        step()
    return passes.entries / n


def report_steps(size: Size, cases: Sequence[Case], repeats: int) -> None:
    """Print a whole training step, from tokens to new weights of the neuron."""
    for rows, length in cases:
        model, batches = build(*size), make_batches(4, rows, length)
        theirs = Reference(model)
        reader = reader_of(model, theirs.names)
        ours, found = neuron_of(reader), theirs.rows(batches)
        cycle = itertools.cycle(batches)
        gap = same_gradients(reader, batches[0], next(theirs.rows(batches)))

        def step(ours: Any = ours, reader: Any = reader, cycle: Any = cycle) -> None:
            gradients = reader.gradients(next(cycle))
            ours.step(gradients["factual"], gradients["difference"])

        steps: dict[str, Callable[[], object]] = {
            "ours": step,
            "reference": lambda theirs=theirs, found=found: theirs.step(next(found)),
        }
        parts: dict[str, Callable[[], object]] = {
            "ours": lambda reader=reader, cycle=cycle: reader.gradients(next(cycle)),
            "reference": lambda found=found: next(found),
        }
        times, alone = in_turns(steps, repeats), in_turns(parts, repeats)
        taken = {name: statistics.median(t) * 1e3 for name, t in times.items()}
        print(
            f"  {named(size)}, {rows:>2} x {length} tokens: ours {taken['ours']:5.0f} ms, reference "
            f"{taken['reference']:5.0f} ms: {ratio(times):.2f} x, {verdict(ratio(times), 2)}; gradients alone "
            f"{ratio(alone):.2f} x; they differ by {gap:.0e}",
            flush=True,
        )


def same_gradients(reader: GradientReader, batch: PairBatch, row: Mapping[str, Tensor]) -> float:
    """The largest norm of a difference between our gradients and the reference's, relative to the gradient's norm."""
    found = reader.gradients(batch)
    gaps = []
    for kind, key in (("factual", "source"), ("difference", "target")):
        mine = torch.cat([block.flatten() for block in found[kind].values()])
        gaps.append(float((mine - row[key][0]).norm() / mine.norm()))
    return max(gaps)


# ---- memory ----------------------------------------------------------------------------------------------------------


def status(field: str) -> float:
    """A line of this process's status, in bytes; `getrusage` would also count the memory of the starting process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure_memory(kind: str, size: Size, case: Case) -> None:
    """Print the peak above the loaded model in n-vectors; this process does nothing else."""
    model, batches = build(*size), make_batches(4, *case)
    names = [name for name, _ in model.named_parameters() if name.startswith("bert.")]
    reader = reader_of(model, names)
    if kind == "reference":
        reference("trainer.text.prediction.model_with_gradiend")
    with torch.no_grad():
        model(**batches[0].inputs)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    start = status("VmRSS")
    run_steps(kind, model, reader, batches)
    print((status("VmHWM") - start) / (4 * entries(reader)))


def run_steps(kind: str, model: Any, reader: GradientReader, batches: Sequence[PairBatch]) -> None:
    """Fit on a few batches; or take gradients and drop each block at once."""
    if kind == "reference":
        theirs = Reference(model)
        for row in itertools.islice(theirs.rows(batches), len(batches)):
            theirs.step(row)
    elif kind == "trained":
        neuron = neuron_of(reader)
        for batch in batches:
            found = reader.gradients(batch)
            neuron.step(found["factual"], found["difference"])
            del found
    elif kind.startswith("closed form"):
        closed_form(reader, batches, finish=False, low_memory=kind.endswith("low_memory"))
    else:
        with reader._reading():
            for batch in batches:
                reader._stream(reader._losses(batch, ("factual",))["factual"], lambda name, block: None)


def closed_form(
    reader: GradientReader, batches: Sequence[PairBatch], *, finish: bool = True, low_memory: bool = False
) -> Any:
    """The feature, or only the sums that it is made from."""
    estimator = ClosedFormEstimator({name: p.shape for name, p in reader.parameters.items()})
    for batch in batches:
        reader.accumulate(batch, "factual", estimator, 1 - 2 * int(batch.label or 0), low_memory=low_memory)
    return estimator.feature() if finish else estimator


def report_memory(size: Size, case: Case, threads: int) -> None:
    """Print the peaks of the three ways of fitting, each in a separate process."""
    targets = {"activations": None, "trained": 12, "closed form": 5, "closed form, low_memory": 5, "reference": None}
    cells = []
    for kind, target in targets.items():
        numbers = map(str, (*size, *case))
        command = [sys.executable, __file__, "--threads", str(threads), "--memory", kind, *numbers]
        run = subprocess.run(command, env=os.environ | RETURNING, capture_output=True, text=True, check=True)
        found = float(run.stdout.split()[-1])
        cells.append(f"{kind} {found:.2f}" + (f" {verdict(found, target, most=True)}" if target else ""))
    print(f"  {named(size)}, {case[0]} x {case[1]} tokens: " + "; ".join(cells), flush=True)


# ---- a feature, end to end -------------------------------------------------------------------------------------------

NAMES = {
    "female": ["Lily", "Mia", "Sara", "Anna", "Emma", "Ella", "Molly", "Sally", "Lucy", "Jane", "Daisy", "Lisa"],
    "male": ["Tom", "Tim", "Ben", "Jack", "Max", "Joe", "John", "Fred", "Leo", "Billy", "Jimmy", "Mark"],
}
UNSEEN = {
    "female": ["Sue", "Amy", "Mary", "Sarah", "Jenny", "Alice"],
    "male": ["Bob", "Sam", "Timmy", "Mike", "Adam", "Henry"],
}
PROMPTS = [
    "{name} was happy because [FEATURE] found a ball .", "{name} ran home when [FEATURE] saw the rain .",
    "{name} was so tired that [FEATURE] slept all day .", "{name} jumped until [FEATURE] fell down .",
    "{name} told mom that [FEATURE] was sorry .", "{name} did not know where [FEATURE] was .",
    "{name} liked the cake , but [FEATURE] wanted more .", "{name} sang a song while [FEATURE] walked .",
    "when {name} was cold , [FEATURE] went home .", "{name} waved when [FEATURE] saw a friend .",
]  # fmt: skip
UNSEEN_PROMPTS = [
    "{name} was sad because [FEATURE] lost a toy .", "{name} waited until [FEATURE] saw the bus .",
    "{name} was hungry , so [FEATURE] ate an apple .", "{name} stopped when [FEATURE] heard a sound .",
    "{name} wanted to swim , but [FEATURE] was too small .", "{name} thought that [FEATURE] was strong .",
]  # fmt: skip
NEUTRAL = [
    "the sun was warm and the sky was blue .", "one day there was a big tree in the park .",
    "the ball was red and round .", "it was a sunny day and the birds sang .", "the cat sat on the mat .",
    "there was a little house on the hill .", "the rain fell on the grass .", "they went to the park to play .",
    "the frog jumped into the water .", "the dog ran to the door .",
    "the cake was big and sweet .", "we saw a boat on the sea .",
]  # fmt: skip
WORDS, CLASSES = {"female": ["she"], "male": ["he"]}, ["female", "male"]


def story_model() -> tuple[Any, Any, str]:
    """A masked model that knows names, its tokenizer, and where the model comes from."""
    folder = Path(os.environ.get("HF_ERASURE_TEST_ASSETS", "../shared/assets")) / "models" / "story-mlm"
    if folder.is_dir():
        model = hf.AutoModelForMaskedLM.from_pretrained(folder).eval()
        return model, hf.AutoTokenizer.from_pretrained(folder), "story-mlm"
    return *taught(), "a small model trained on the spot"


def taught(steps: int = 400) -> tuple[Any, Any]:
    """A model that was trained on all names in all prompts, with their pronouns."""
    texts = [
        prompt.format(name=name).replace("[FEATURE]", WORDS[label][0]).lower()
        for label in CLASSES
        for name in NAMES[label] + UNSEEN[label]
        for prompt in PROMPTS + UNSEEN_PROMPTS
    ] + 20 * NEUTRAL
    tokenizer = word_tokenizer(texts)
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=512,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = hf.BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = tokenizer(texts, return_tensors="pt", padding=True)
    for _ in range(steps):
        rows = torch.randint(len(texts), (48,))
        ids, mask = tokens["input_ids"][rows].clone(), tokens["attention_mask"][rows]
        hidden = (torch.rand(ids.shape) < 0.2) & (ids > 4)
        labels = ids.masked_fill(~hidden, -100)
        loss = model(input_ids=ids.masked_fill(hidden, 4), attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


def word_tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizer with one token for each lower-case word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in texts for word in text.split()})
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **names)


@dataclass
class Held:
    """Gradients of unseen names in unseen prompts, and of neutral texts."""

    gradients: list[dict[str, Tensor]]
    labels: list[int]

    def read(self, encode: Callable[[Mapping[str, Tensor]], float]) -> dict[str, float]:
        """Absolute correlations without (`cor`) and with neutral texts (`cor_enc`)."""
        found = encoded([encode(g) for g in self.gradients], self.labels, ("female", "male")).metrics()
        return {name: 0.0 if math.isnan(found[name]) else abs(found[name]) for name in ("cor", "cor_enc")}


def held_out(reader: GradientReader, tokenizer: Any, model: Any) -> Held:
    """The data that the two estimators are compared on."""
    pairs = PairSet(pairs_from_templates(UNSEEN_PROMPTS, UNSEEN, WORDS, CLASSES), tokenizer, "masked", CLASSES)
    batches = [(b, 1 - 2 * int(b.label or 0)) for b in pairs.batches(1)]
    texts = Dataset.from_dict({"text": NEUTRAL})
    for seed in range(2):
        batches += [
            (b, 0)
            for b in neutral_batches(
                texts, tokenizer, "masked", ["he", "she"], batch_size=1, seed=seed, config=model.config
            )
        ]
    wanted = ("factual",)
    return Held([reader.gradients(b, wanted=wanted)["factual"] for b, _ in batches], [sign for _, sign in batches])


def report_end_to_end(patience: float, every: int) -> None:
    """Print the closed form against the trained neuron, at the learning rate that reaches its correlation first."""
    model, tokenizer, origin = story_model()
    names = [name for name, _ in model.named_parameters() if name.startswith("bert.")]
    reader = reader_of(model, names)
    pairs = PairSet(pairs_from_templates(PROMPTS, NAMES, WORDS, CLASSES), tokenizer, "masked", CLASSES)
    held, batches = held_out(reader, tokenizer, model), pairs.batches(8, seed=0, shuffle=True)
    print(
        f"\nEnd to end on {origin} (n = {entries(reader) / 1e6:.1f} M): {len(pairs)} pairs in batches of 8; cor is the "
        "correlation on\nunseen names in unseen prompts, cor_enc that with neutral texts among them."
    )
    one_each = [next(b for b in batches if b.label == label) for label in (0, 1)]
    closed_form(reader, one_each)
    for part in (one_each, batches):
        taken = min(seconds(lambda part=part: closed_form(reader, part)) for _ in range(3))
        aim = held.read(closed_form(reader, part).encoder.encode)
        print(f"  closed form, {len(part)} batches: {taken:.2f} s; cor {aim['cor']:.3f}, cor_enc {aim['cor_enc']:.3f}")
    first: dict[str, list[float]] = {"cor": [], "cor_enc": []}
    for lr in LEARNING_RATES:
        run = train(reader, pairs, held, aim, lr, patience * taken, every)
        for key in first:
            first[key].append(run.reached[key])
        print(f"  trained, lr {lr:g}: " + "; ".join(map(run.line, first)), flush=True)
    for key, times in first.items():
        if min(times) < math.inf:
            multiple = min(times) / taken
            print(f"  the same {key}: {min(times):.2f} s of training, {multiple:.1f} x, {verdict(multiple, 10)}")
        else:
            print(f"  the same {key}: by no run within {patience} x the closed form's time, {verdict(patience, 10)}")


@dataclass
class Run:
    """Seconds of training, without evaluation, until each correlation was reached, and its first and best value."""

    reached: dict[str, float]
    start: dict[str, float]
    best: dict[str, float]
    spent: float = 0.0

    def line(self, key: str) -> str:
        """The result of the run in words."""
        at = self.reached[key]
        after = f"after {at:.2f} s" if at < math.inf else f"not in {self.spent:.1f} s"
        return f"{key} {after} ({self.start[key]:.3f} untrained, best {self.best[key]:.3f})"


def train(
    reader: GradientReader, pairs: PairSet, held: Held, aim: Mapping[str, float], lr: float, limit: float, every: int
) -> Run:
    """Train until all correlations of `aim` are reached, or for `limit` seconds."""
    neuron = neuron_of(reader, lr)

    def read() -> dict[str, float]:
        return held.read(neuron.encoder().encode)

    run = Run(dict.fromkeys(aim, math.inf), read(), dict.fromkeys(aim, 0.0))
    batches: list[PairBatch] = []

    def step() -> None:
        found = reader.gradients(batches.pop())
        neuron.step(found["factual"], found["difference"])

    number = 0
    while run.spent <= limit and max(run.reached.values()) == math.inf:
        number += 1
        batches = batches or pairs.batches(8, seed=number, shuffle=True)
        run.spent += seconds(step)
        if number % every == 0:
            for key, value in read().items():
                run.best[key] = max(run.best[key], value)
                if value >= aim[key]:
                    run.reached[key] = min(run.reached[key], run.spent)
    return run


# ---- encoding --------------------------------------------------------------------------------------------------------


def report_encoding(repeats: int) -> None:
    """Print texts per second, from a text to the value of the neuron, with one gradient for each text."""
    model, tokenizer, origin = story_model()
    theirs = Reference(model, tokenizer)
    reader = reader_of(model, theirs.names)
    rows = pairs_from_templates(UNSEEN_PROMPTS[:4], UNSEEN, WORDS, CLASSES)
    encoder = neuron_of(reader).feature().encoder
    texts = [(row["text"].replace("[FEATURE]", tokenizer.mask_token), row["factual"]) for row in rows]

    def ours() -> list[float]:
        batches = PairSet(rows, tokenizer, "masked", CLASSES).batches(1)
        return [encoder.encode(reader.gradients(batch, wanted=("factual",))["factual"]) for batch in batches]

    def reference_encode() -> list[float]:
        return [theirs.model.encode(text, word, return_float=True) for text, word in texts]

    times = in_turns({"ours": ours, "reference": reference_encode}, repeats)
    speed = {name: len(texts) / statistics.median(found) for name, found in times.items()}
    print(
        f"\nEncoding on {origin}, tokenising included, one text at a time: ours {speed['ours']:.0f} texts/s, reference "
        f"{speed['reference']:.0f} texts/s: {ratio(times):.2f} x",
        flush=True,
    )


def report(parts: Sequence[str], quick: bool, threads: int) -> None:
    """Run the requested parts."""
    rounds = 3 if quick else 5
    print(f"torch {torch.__version__}, {threads} thread(s), CPU, float32; processor time, medians of {rounds} rounds")
    print(f"gradiend {reference('').__version__}; BERT for masked language modelling with random weights")
    if "neuron" in parts:
        print("\nNeuron alone, one training step. Passes: what every operation reads and writes, counted as it runs.")
        print("By the code, 24 of ours come from memory (4 for products; 11 read, 9 written), others from cache.")
        for size in SIZES[:2] if quick else SIZES:
            report_neuron(size, rounds)
    if "step" in parts:
        print("\nA whole training step: gradients and neuron.")
        for size, cases in zip(SIZES, (BATCHES, BATCHES[:2], BATCHES[:1]), strict=True):
            report_steps(size, cases[:1] if quick else cases, rounds if size[0] == 4 else 3)
    if "memory" in parts:
        print("\nPeak memory above the loaded model, in n-vectors of float32; activations: of forward and backward")
        print("passes whose gradients are dropped block by block.")
        for size in (*SIZES[:2], *(() if quick else (BASE,))):
            report_memory(size, BATCHES[1], threads)
    if "fit" in parts:
        report_end_to_end(5 if quick else PATIENCE, 10)
    if "encode" in parts:
        report_encoding(rounds)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    torch.set_num_threads(options.threads)
    if options.memory:
        kind, *numbers = options.memory
        layers, width, words, rows, length = map(int, numbers)
        measure_memory(kind, (layers, width, words), (rows, length))
        return
    started, used = time.perf_counter(), time.process_time()
    report(options.parts, options.quick, options.threads)
    took, busy = time.perf_counter() - started, time.process_time() - used
    print(f"\n{took / 60:.1f} minutes in all, {busy / 60:.1f} of them computing in this process")


if __name__ == "__main__":
    main()
