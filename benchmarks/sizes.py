"""What adapters cost on models of real size: time in multiples of a plain forward pass, peak memory above the model.

    python benchmarks/sizes.py [model …] [--memory] [--growth [250 …]] [--quick] [--threads 1]

Models are built from their configurations, with random weights. Each runs in a separate process. A step runs between
two plain passes over the same batches, and its processor time is divided by the mean of theirs, so other programs do
not change it. Peak memory of a step is the process's peak above what it held before, as Linux counts it; the mark is
reset at every step. It is compared with the formulas in docs/speed.md.

`--memory` prints only peaks, with glibc's allocator set to give every block of 128 KB or more back to the system as
soon as it is freed (MALLOC_MMAP_THRESHOLD_). By default it does not. The peaks are then what the steps really hold.

`--growth` fits a small model on growing numbers of batches from a stream, and prints time and memory.
`--quick` takes small models, to try the script itself.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.fitting.forward_passes import TensorsOnDisk
from hf_erasure.fitting.gradiend import GradientReader, PairBatch
from hf_erasure.gradiend import ClosedFormEstimator

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()
logging.disable(logging.INFO)
warnings.simplefilter("ignore")

DENSITY = 1e-3  # the density of the GRADIEND adapters
SEQUENTIAL = 3.0  # plain passes that a sequential fit may take
MEMORY = 1.2  # times its formula that a step may hold
GROWTH = (250, 1000, 4000, 16000)  # batches
GIVEN_BACK = 1 << 17  # bytes of a block that the allocator gives back when it is freed
LINEAR = 0.15  # the share by which the time of a batch may differ

# Class of the model, class of its configuration, arguments, dtype; rows and tokens of a batch.
_TEXT = {"use_cache": False}
MODELS: dict[str, tuple[str, str, dict[str, Any], torch.dtype, tuple[int, int]]] = {
    "bert-base": ("BertForMaskedLM", "BertConfig", {}, torch.float32, (16, 128)),
    "bert-large": (
        "BertForMaskedLM", "BertConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        torch.float32, (8, 128),
    ),
    "gpt2-medium": (
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 1024, "n_layer": 24, "n_head": 16, **_TEXT}, torch.float32, (8, 128)
    ),
    "llama-1b": (
        "LlamaForCausalLM", "LlamaConfig",
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
         "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True, **_TEXT},
        torch.bfloat16, (8, 64),
    ),
    "qwen3-moe-small": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
         "head_dim": 64, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_experts": 16,
         "num_experts_per_tok": 4, "vocab_size": 32000, **_TEXT},
        torch.float32, (8, 128),
    ),
    "vit-base": ("ViTForImageClassification", "ViTConfig", {}, torch.float32, (8, 0)),
}  # fmt: skip
# Parameters whose gradients are read, if not all: of 1.2 B weights only four blocks, as five vectors of all take 25 GB.
READ = {"llama-1b": r"\.layers\.1[2-5]\."}
SMALL = {
    "hidden_size": 64, "n_embd": 64, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 2000,
}  # fmt: skip


def build(name: str, *, quick: bool) -> Any:
    """A model with random weights."""
    kind, config_kind, given, dtype, _ = MODELS[name]
    config_class = getattr(hf, config_kind)
    config = config_class(**given)
    if quick:
        config = config_class(**given | {name: value for name, value in SMALL.items() if hasattr(config, name)})
    torch.manual_seed(0)
    return getattr(hf, kind)._from_config(config, dtype=dtype).eval()


def batches_of(name: str, count: int, words: int, *, quick: bool) -> list[dict[str, Tensor]]:
    """Tokens, or pixels, that show the class."""
    rows, length = MODELS[name][4]
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        labels = torch.arange(rows) % 2
        if not length:
            pixels = torch.randn(rows, 3, 224, 224, generator=generator) + labels.view(-1, 1, 1, 1)
            found.append({"pixel_values": pixels, "concept_labels": labels})
            continue
        length = 32 if quick else length
        ids = torch.randint(10, words // 2, (rows, length), generator=generator) + labels[:, None] * 100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels})
    return found


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a batch that the model takes."""
    return {name: value for name, value in batch.items() if name != "concept_labels"}


# ---- measuring -------------------------------------------------------------------------------------------------------


def held(field: str) -> float:
    """A line of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measured(step: Callable[[], object]) -> tuple[float, float]:
    """Processor time of a step, and its peak memory in MB above what was held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # so that memory freed before cannot be used again
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark of the peak
    before, start = held("VmRSS"), time.process_time()
    step()
    return time.process_time() - start, held("VmHWM") - before


def packed(width: int) -> float:
    """MB of the float64 sums of one site: block columns of the upper triangle, 128 or 256 wide."""
    block = 128 if width <= 1024 else 256
    return 8 * width * (width + block) / 2 / 2**20


def expected(step: str, widths: list[int], plain: float, state: float, count: int) -> float | None:
    """MB above the model by the formula in docs/speed.md, if the step has one; `state` is what a batch holds at a stop.

    The state is what the frames of a pass keep alive, which depends on the architecture. It is as large as the files of
    a batch that is not resident.
    """
    largest = max(widths, default=0)
    # An update, or a solve: packed float32 products and centred rows, or one float64 matrix in addition to the sums.
    working = 2 * packed(largest) + 8 * largest**2 / 2**20
    if step == "one pass":
        return plain + min(sum(map(packed, widths)), 2048 + packed(largest)) + working
    if step.startswith("sequential"):
        resident = count if step == "sequential" else int(step.split()[-1])
        return plain + (resident - 1) * state + packed(largest) + working
    return None


def run_model(name: str, count: int, *, quick: bool, timed_too: bool) -> None:
    """Print a line of JSON for each step; this process does nothing else."""
    model = build(name, quick=quick)
    config = model.config
    batches = batches_of(name, count, int(getattr(config, "vocab_size", 0) or 0), quick=quick)
    backbone = model.base_model

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                backbone(**inputs_of(batch))

    def say(step: str, seconds: float, memory: float, **more: Any) -> None:
        print(json.dumps({"step": step, "seconds": seconds, "memory": memory, **more}), flush=True)

    plain()
    last, own = measured(plain)
    weights = sum(p.numel() for p in model.parameters())
    say("plain", last, own, weights=weights, bytes=sum(p.numel() * p.element_size() for p in model.parameters()))
    config_ = ConceptErasureConfig(labels=["a", "b"])

    waiting, write = 0.0, TensorsOnDisk._write

    def noted(tensors: TensorsOnDisk, index: int) -> None:
        nonlocal waiting
        write(tensors, index)
        waiting = max(waiting, Path(tensors._folder.name, str(index)).stat().st_size / 2**20)

    TensorsOnDisk._write = noted  # type: ignore[method-assign]

    def timed(step: str, run: Callable[[], object]) -> None:
        nonlocal last
        try:
            seconds, memory = measured(run)
        except ValueError as error:
            say(step, 0.0, 0.0, refused=str(error).split(": ")[0][:60])
            return
        after = measured(plain)[0] if timed_too else last
        widths = [layer.eraser_state("gender")[0].shape[0] for layer in erasure_layers(model).values()]
        say(step, 2 * seconds / (last + after), memory, expected=expected(step, widths, own, waiting, count))
        last = after

    def fit(**options: Any) -> None:
        fit_concept_erasure(model, batches, "gender", progress=False, **options)

    timed("add", lambda: model.add_adapter(config_, adapter_name="gender"))
    timed("one pass", lambda: fit(sequential=False))
    timed("sequential, resident 1", lambda: fit(resident_batches=1))
    timed("sequential", fit)
    with tempfile.TemporaryDirectory() as folder:
        timed("save", lambda: model.save_pretrained(folder))
        files = sum(path.stat().st_size for path in Path(folder).glob("adapter_model*"))
        timed("load", lambda: model.load_adapter(folder, adapter_name="again"))
        say("size", files / 2**20, 0.0)
        model.delete_adapter("again")
        model.delete_adapter("gender")
        # Norms that feed sums cannot be merged, so the erasure is at linear layers, without an affine part.
        config_ = ConceptErasureConfig(labels=["a", "b"], affine=False, target_modules=_linear_of(name))
        model.add_adapter(config_, adapter_name="gender")
        fit(sequential=False)
        model.save_pretrained(folder)
        model.delete_adapter("gender")
        wrapped = peft.PeftModel.from_pretrained(model, folder, adapter_name="gender")
        timed("merge", wrapped.merge_adapter)
    if MODELS[name][4][1]:
        gradiend(name, quick=quick, timed_too=timed_too)


def _linear_of(name: str) -> str:
    """Linear layers, one in each block."""
    return {"gpt2-medium": r".*\.attn\.c_proj", "vit-base": r".*attention\.o_proj"}.get(
        name, r".*attention\.output\.dense" if "bert" in name else r".*self_attn\.o_proj"
    )


def gradiend(name: str, *, quick: bool, timed_too: bool) -> None:
    """The closed form at a density, in multiples of a plain forward and backward pass."""
    model = build(name, quick=quick)
    rows, length = 2, 32
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for number in range(4):
        ids = torch.randint(10, 1000, (rows, length), generator=generator)
        at = torch.full((rows,), length - 1)
        words = torch.full((rows,), 5 + number % 2), torch.full((rows,), 6 - number % 2)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pairs.append(PairBatch(inputs, torch.arange(rows), at, *words, label=number % 2, other=1 - number % 2))
    base = {id(p) for p in model.base_model.parameters()}
    own = {n: p for n, p in model.named_parameters() if id(p) in base and re.search(READ.get(name, ""), n)}
    reader = GradientReader(model, own)
    n = sum(p.numel() for p in own.values()) * 4 / 2**20  # MB of one float32 vector
    for low in (False, True):

        def fit(low: bool = low) -> None:
            estimator = ClosedFormEstimator(reader.shapes)
            for batch in pairs:
                reader.accumulate(batch, "factual", estimator, 1 - 2 * int(batch.label or 0), low_memory=low)
            feature = estimator.feature()
            feature.decoder.prune(DENSITY), feature.encoder.prune(DENSITY)

        def backward() -> None:
            for batch in pairs:
                reader.gradients(batch)

        seconds, memory = measured(fit)
        plain = measured(backward)[0] if timed_too else seconds
        step = "gradiend, low memory" if low else "gradiend"
        say = {"step": step, "seconds": seconds / plain, "memory": memory, "vectors": memory / n, "n": n * 2**20 / 4}
        print(json.dumps(say), flush=True)


# ---- growth ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Batches that exist only when they are read."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            labels = torch.arange(4) % 2
            ids = torch.randint(10, 500, (4, 32), generator=generator) + labels[:, None] * 100
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels}


def run_growth(count: int, resident: int | None) -> None:
    """Print time and memory of a fit on `count` batches; this process does nothing else."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.BertModel(hf.BertConfig(**sizes, intermediate_size=512)).eval()
    model.add_adapter(ConceptErasureConfig(labels=["a", "b"]), adapter_name="gender")
    data = DataLoader(Stream(count), batch_size=None)
    fit_concept_erasure(model, list(itertools.islice(data, 4)), "gender", progress=False)

    def plain() -> None:
        with torch.no_grad():
            for batch in data:
                model(**inputs_of(batch))

    before, _ = measured(plain)
    taken, memory = measured(
        lambda: fit_concept_erasure(model, data, "gender", progress=False, resident_batches=resident)
    )
    after, _ = measured(plain)
    print(json.dumps({"batch": taken / count, "ratio": 2 * taken / (before + after), "memory": memory}))


def report_growth(counts: Sequence[int], threads: int) -> None:
    """Print time and memory against the number of batches."""
    print("\nGrowth: BERT 128 x 2, batches of 4 x 32 tokens from an IterableDataset; sequential")
    print(f"  {'resident':>8} {'batches':>8} {'x plain':>8} {'ms/batch':>9} {'peak MB':>8}")
    for resident in (None, 8):
        first = None
        for count in counts:
            found = in_process(["--only-growth", str(count), "--resident", str(resident or 0)], threads)[-1]
            first = first or found["ratio"]
            off = found["ratio"] / first - 1
            mark = "" if abs(off) <= LINEAR else f"  {off:+.0%} a batch, limit {LINEAR:.0%}"
            print(
                f"  {resident!s:>8} {count:>8} {found['ratio']:>8.2f} {found['batch'] * 1e3:>9.1f} "
                f"{found['memory']:>8.0f}{mark}",
                flush=True,
            )


# ---- reports ---------------------------------------------------------------------------------------------------------


def in_process(arguments: list[str], threads: int, **variables: str) -> list[dict[str, Any]]:
    """The JSON that this script prints when it runs in a separate process."""
    command = [sys.executable, __file__, *arguments, "--threads", str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode:
        print(f"  ended with {run.returncode}: {run.stderr.strip().splitlines()[-1:]}", flush=True)
    return found


def report_model(name: str, count: int, threads: int, *, quick: bool, memory: bool) -> None:
    """Print the table of one model."""
    arguments = ["--only", name, "--batches", str(count), *(["--quick"] if quick else [])]
    if memory:
        steps = in_process([*arguments, "--memory"], threads, MALLOC_MMAP_THRESHOLD_=str(GIVEN_BACK))
    else:
        steps = in_process(arguments, threads)
    plain = steps[0]
    print(
        f"\n{name}: {plain['weights'] / 1e6:.0f} M weights, {plain['bytes'] / 2**20:.0f} MB; {count} batches of "
        f"{MODELS[name][4][0]} x {MODELS[name][4][1] or '224²'}; a plain pass "
        f"{'' if memory else '{:.2f} s, '.format(plain['seconds'])}{plain['memory']:.0f} MB",
    )
    for found in steps[1:]:
        if found["step"] == "size" and memory:
            continue
        if found["step"] == "size":
            print(f"  {'adapter':<24} {found['seconds']:8.2f} MB on disk")
            continue
        if "refused" in found:
            print(f"  {found['step']:<24} refused: {found['refused']}")
            continue
        line = f"  {found['step']:<24} "
        line += ("" if memory else f"{found['seconds']:7.2f} x  ") + f"{found['memory']:7.0f} MB"
        if not memory and found["step"].startswith("sequential") and found["seconds"] > SEQUENTIAL:
            line += f"  over {SEQUENTIAL:g} x"
        if found.get("expected"):
            share = found["memory"] / found["expected"]
            line += f"  {share:.2f} of the formula" + ("" if share <= MEMORY else f", over {MEMORY:g}")
        if "vectors" in found:
            line += f"  {found['vectors']:.1f} vectors of n = {found['n'] / 1e6:.0f} M"
        print(line, flush=True)


def main() -> None:
    """Run everything, or one part in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help=f"among {', '.join(MODELS)}; all by default")
    parser.add_argument("--memory", action="store_true", help="print peak memory alone, as it is held")
    parser.add_argument("--growth", type=int, nargs="*", help=f"numbers of batches; {GROWTH} by default")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--only-growth", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--resident", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        run_model(options.only, options.batches, quick=options.quick, timed_too=not options.memory)
    elif options.only_growth:
        run_growth(options.only_growth, options.resident or None)
    else:
        print(f"torch {torch.__version__}, {options.threads} thread(s), CPU; processor time")
        for name in options.models or (MODELS if options.growth is None else ()):
            report_model(name, options.batches, options.threads, quick=options.quick, memory=options.memory)
        if options.growth is not None:
            report_growth(options.growth or (GROWTH[:2] if options.quick else GROWTH), options.threads)


if __name__ == "__main__":
    main()
