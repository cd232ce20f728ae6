"""Fitting in several processes: processor time of a row, and bytes that a process sends to the others.

    python benchmarks/processes.py [--counts 1 2 4] [--width 768] [--layers 2] [--batches 8]

`torchrun` starts each count of processes on this machine, one thread each, over gloo. Every process has its share of
the same rows. The processor time of all processes together is divided by the rows that they have read, so other
programs do not change it, nor does a machine with fewer cores than processes. The bytes of the tensors and objects that
one process sends are divided by the number of sites; the floor is one covariance in float64, d² · 8.
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from accelerate import PartialState

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers

hf.logging.set_verbosity_error()
logging.disable(logging.INFO)
warnings.simplefilter("ignore")

ROWS, TOKENS = 8, 64  # in a batch
WAYS = {"one pass": False, "sequential": True}


class Counted:
    """Counts the bytes that this process sends to others through `torch.distributed`."""

    def __init__(self) -> None:
        self.bytes = 0
        reduce, gather = torch.distributed.all_reduce, torch.distributed.all_gather_object

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += tensor.numel() * tensor.element_size()
            return reduce(tensor, *args, **kwargs)

        def all_gather_object(found: list[Any], item: Any, *args: Any, **kwargs: Any) -> Any:
            self.bytes += len(pickle.dumps(item))
            return gather(found, item, *args, **kwargs)

        torch.distributed.all_reduce, torch.distributed.all_gather_object = all_reduce, all_gather_object


def batches_of(count: int) -> list[dict[str, torch.Tensor]]:
    """Texts whose tokens show the class."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        labels = torch.arange(ROWS) % 2
        ids = torch.randint(10, 500, (ROWS, TOKENS), generator=generator) + labels[:, None] * 100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels})
    return found


def run_one(width: int, layers: int, batches: int, folder: Path) -> None:
    """Fit in this process, one of several, and write its time and bytes."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    model = hf.BertModel(hf.BertConfig(**sizes, num_attention_heads=width // 64)).eval()
    model.add_adapter(ConceptErasureConfig(labels=["a", "b"]), adapter_name="gender")
    mine, counted = batches_of(batches)[state.process_index :: state.num_processes], Counted()
    found: dict[str, Any] = {"sites": len(erasure_layers(model)), "rows": len(mine) * ROWS}
    with torch.no_grad():
        model(**{key: value for key, value in mine[0].items() if key != "concept_labels"})
    for way, sequential in WAYS.items():
        counted.bytes, start = 0, time.process_time()
        fit_concept_erasure(model, mine, "gender", sequential=sequential, progress=False)
        found[way] = {"seconds": time.process_time() - start, "bytes": counted.bytes}
    (folder / f"{state.process_index}.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    state.destroy_process_group()


def report(counts: list[int], width: int, layers: int, batches: int) -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, CPU; BERT {width} x {layers}, {batches} batches of {ROWS} x {TOKENS} tokens")
    print(f"  {'processes':>9} {'way':>12} {'ms a row':>9} {'x one process':>14} {'MB a site':>10} {'x d² · 8':>9}")
    alone: dict[str, float] = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            given = ["--width", str(width), "--layers", str(layers), "--batches", str(batches), "--folder", folder]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            subprocess.run([*launcher, __file__, *given], check=True, capture_output=True, text=True)
            found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
        for way in WAYS:
            row = sum(each[way]["seconds"] for each in found) / sum(each["rows"] for each in found)
            site = max(each[way]["bytes"] for each in found) / found[0]["sites"]
            alone.setdefault(way, row)
            print(
                f"  {count:>9} {way:>12} {row * 1e3:>9.1f} {row / alone[way]:>14.2f} {site / 2**20:>10.2f} "
                f"{site / (8 * width**2):>9.2f}",
                flush=True,
            )


def main() -> None:
    """Run everything, or one process of several."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is None:
        report(given.counts, given.width, given.layers, given.batches)
    else:
        run_one(given.width, given.layers, given.batches, given.folder)


if __name__ == "__main__":
    main()
