"""Whether adapters that were saved earlier are still the same, to the bit, and whether older code reads new ones.

    python -m tests.saved_before write FOLDER        save all adapters and their outputs with the code here
    python -m tests.saved_before compare [FOLDER]    load them with the code here, and compare to the bit
    python -m tests.saved_before afterwards CHECKOUT save them with the code here, and compare with the code of another
                                                     checkout of the repository, such as a git worktree

Sums in another order have other last bits, so `compare` on the repository's fixture needs the processor that wrote it.
To compare bits on another processor, write with the older code and compare with the newer code, both on it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_erasure

from .bases import BASES, base_of, digest_of
from .cases import ADAPTERS, BASE_DIGESTS, CASES, EXPECTED, FILES, HERE, Case, read_config, save, seen

COLUMNS = ("loads", "tensors", "config", "output", "peft", "merge")


def write(folder: Path) -> None:
    """Save all adapters, their results, and the digests of their base models."""
    for name in (ADAPTERS, EXPECTED):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / EXPECTED).mkdir(parents=True)
    for case in CASES:
        place = folder / ADAPTERS / str(case)
        save(case, place)
        found = seen(case, place)
        tensors = {key: value.contiguous() for key, value in found.tensors.items()}
        save_file(tensors, folder / EXPECTED / f"{case}.safetensors", {"refusal": found.refusal})
    digests = {name: digest_of(base_of(name)) for name in BASES}
    (folder / BASE_DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def expected(case: Case, folder: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of an adapter when it was saved, and the type of the error that refused its merge."""
    path = folder / EXPECTED / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()["refusal"]


def verdicts(case: Case, folder: Path) -> dict[str, bool]:
    """Column of the table → whether the adapter's results are equal to those saved, to the bit."""
    try:
        now = seen(case, folder / ADAPTERS / str(case))
    except Exception as error:
        print(f"{case}: {type(error).__name__}: {error}")
        return dict.fromkeys(COLUMNS, False)
    then, refusal = expected(case, folder)
    place = folder / ADAPTERS / str(case)
    return {
        "loads": True,
        "tensors": _equal(now.held, load_file(place / FILES[1])),
        "config": now.config == read_config(place),
        "output": torch.equal(now.tensors["output"], then["output"]) and not torch.equal(now.base, then["output"]),
        "peft": torch.equal(now.peft, then["output"]),
        "merge": now.refusal == refusal and _equal(now.tensors, then),
    }


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def compare(folder: Path) -> bool:
    """Print a line for each adapter that differs, and the table; True if all are equal to the bit."""
    print(f"hf_erasure {hf_erasure.__version__} of {Path(hf_erasure.__file__).parent} reads {folder}")
    digests = json.loads((folder / BASE_DIGESTS).read_text(encoding="utf-8"))
    same = sum(digest_of(base_of(name)) == digest for name, digest in digests.items())
    print(f"base models: {same} of {len(digests)} equal to the bit")
    counts: dict[str, dict[str, int]] = {}
    is_good = same == len(digests)
    for case in CASES:
        found = verdicts(case, folder)
        if wrong := [column for column in COLUMNS if not found[column]]:
            print(f"{case}: not the same: {', '.join(wrong)}")
        row = counts.setdefault(case.kind, dict.fromkeys(("adapters", "refused", *COLUMNS), 0))
        row["adapters"] += 1
        row["refused"] += bool(expected(case, folder)[1])
        for column in COLUMNS:
            row[column] += found[column]
        is_good &= not wrong
    counts["all"] = {
        column: sum(row[column] for row in counts.values()) for column in ("adapters", "refused", *COLUMNS)
    }
    print(f"{'kind':18}" + "".join(f"{column:>10}" for column in counts["all"]))
    for kind, row in counts.items():
        print(f"{kind:18}" + "".join(f"{value:>10}" for value in row.values()))
    print("Equal to the bit." if is_good else "NOT equal to the bit.")
    return is_good


def afterwards(checkout: Path) -> bool:
    """Save with the code here; load, run and merge with the code of another checkout."""
    if not (checkout / "hf_erasure" / "__init__.py").is_file():
        sys.exit(f"{checkout} is not a checkout of the repository: it has no hf_erasure/__init__.py.")
    with tempfile.TemporaryDirectory() as name:
        place, saved = Path(name), Path(name) / "saved"
        write(saved)
        # Both checkouts have a package `tests`; this copy comes first on the path, so both run the same comparison.
        copied = place / "tests" / HERE.name
        shutil.copytree(HERE, copied, ignore=shutil.ignore_patterns(ADAPTERS, EXPECTED, "__pycache__"))
        paths = os.pathsep.join([str(place), str(checkout.resolve())])
        command = [sys.executable, "-m", f"tests.{HERE.name}", "compare", str(saved)]
        return subprocess.run(command, cwd=place, env={**os.environ, "PYTHONPATH": paths}).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["write", "compare", "afterwards"])
    parser.add_argument("path", type=Path, nargs="?", help="the folder, or the other checkout; the fixture by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.mode == "compare":
        sys.exit(not compare(options.path or HERE))
    if options.path is None:
        sys.exit(f"{options.mode} needs a path: see --help.")
    if options.mode == "write":
        write(options.path)
    else:
        sys.exit(not afterwards(options.path))


if __name__ == "__main__":
    main()
