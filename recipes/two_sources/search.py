"""python recipes/two_sources/search.py [DATA.csv] [--model embedded] [--out out/two-sources]

Search across two sources: each thing is described by both, and one description is to find the other among all. What an
encoder says of the source stands in the way: texts of one source are near each other whatever they are about. So the
source is erased, on half the things, and search is judged on the other half (after arXiv 2507.01234, whose method is
LEACE of the source). Without DATA.csv it is the catalogue in two house styles that `catalogue.py` writes.

DATA.csv has the columns `pair`, `source` (two of them) and `text`; each pair has one text of either source.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from catalogue import rows as catalogue
from datasets import Dataset, Value
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_erasure import ConceptErasureConfig, concept_dataloader, fit_concept_erasure
from hf_erasure.recipes import embedded_model
from hf_erasure.recipes.erasure import pooled_states
from hf_erasure.recipes.run import load_source

NAME = "no_source"
RESAMPLES = 1000
KS = (1, 10)


def found_at(states: Tensor, pairs: list[str]) -> Tensor:
    """At which place the other text of its pair stands, for each text as a query against all others, from 1."""
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    near = (unit @ unit.T).fill_diagonal_(-2)
    other = {}
    for row, pair in enumerate(pairs):
        other.setdefault(pair, []).append(row)
    counterpart = torch.tensor([next(r for r in other[pair] if r != row) for row, pair in enumerate(pairs)])
    return (near > near.gather(1, counterpart[:, None])).sum(1) + 1


def recall(places: Tensor, pairs: list[str], k: int) -> tuple[float, float, float]:
    """The share of queries whose counterpart is among the first k, and 95 % of a bootstrap over pairs."""
    numbers = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    by_pair = torch.zeros(len(numbers), dtype=torch.double)
    by_pair.index_add_(0, torch.tensor([numbers[pair] for pair in pairs]), (places <= k).double() / 2)
    drawn = torch.randint(len(by_pair), (RESAMPLES, len(by_pair)), generator=torch.Generator().manual_seed(0))
    low, high = by_pair[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return float(by_pair.mean()), low, high


@dataclass
class Search:
    """Texts of two sources, and what is fitted on some of the pairs and judged on others.

    Attributes:
        rows: With `pair`, `source` and `text`.
        base: The model's folder or name.
        target: The last norm: its erasure and the mean over tokens can be exchanged, so that it is one matrix behind
            the pooling.
    """

    rows: Dataset
    base: str
    target: str

    def __post_init__(self) -> None:
        self.sources = sorted(set(self.rows["source"]))
        texts = {(row["pair"], row["source"]): row["text"] for row in self.rows}
        one, other = self.sources
        # Each pair once, for directions within pairs: the text of the second source beside that of the first.
        others = [texts[row["pair"], other] if row["source"] == one else None for row in self.rows]
        self.rows = self.rows.add_column("other", others)

    def judge(self, fitted: set[str], judged: set[str], rank: int, folder: Path | None = None) -> dict[str, Any]:
        """Recall on some pairs, without and with an erasure that was fitted on others."""
        model, tokenizer = AutoModel.from_pretrained(self.base), AutoTokenizer.from_pretrained(self.base)
        config = ConceptErasureConfig(concept="source", labels=self.sources, target_modules=[self.target])
        model.add_adapter(config, adapter_name=NAME)
        options = {"text_column": "text", "label_column": "source", "labels": self.sources, "max_length": 256}
        paired = {"counterfactual_column": "other"} if rank else {}
        part = self.rows.select([i for i, pair in enumerate(self.rows["pair"]) if pair in fitted])
        fit_concept_erasure(
            model, concept_dataloader(part, tokenizer, **options, **paired), NAME, pool="mean", sequential=False,
            progress=False, **({"pair_rank": rank} if rank else {}),
        )  # fmt: skip
        if folder is not None:
            model.save_pretrained(folder)
        part = self.rows.select([i for i, pair in enumerate(self.rows["pair"]) if pair in judged])
        found, pairs = {}, list(part["pair"])
        for when in ("before", "after"):
            batches = concept_dataloader(part, tokenizer, **options)
            states = pooled_states(model, batches, NAME, erased=when == "after", pool="mean", progress=False)
            places = found_at(states["last_hidden_state"], pairs)
            found[when] = {f"recall@{k}": recall(places, pairs, k) for k in KS}
        return found

    def split(self, seed: int, ranks: list[int], folder: Path | None) -> dict[str, Any]:
        """Fit on half the pairs and judge on the other half; a rank is chosen on a quarter of the first half."""
        names = sorted(set(self.rows["pair"]))
        random.Random(seed).shuffle(names)
        fitted, judged = names[: len(names) // 2], names[len(names) // 2 :]
        kept = fitted[: 3 * len(fitted) // 4]
        chosen = ranks[0]
        if len(ranks) > 1:
            tried = {r: self.judge(set(kept), set(fitted[len(kept) :]), r)["after"]["recall@1"][0] for r in ranks}
            chosen = max(ranks, key=lambda rank: tried[rank])
        found = self.judge(set(fitted), set(judged), 0, None if chosen else folder)
        result = {"before": found["before"], "source erased": found["after"]}
        if chosen:
            result["and pairs"] = self.judge(set(fitted), set(judged), chosen, folder)["after"]
        return {"pairs fitted on": len(fitted), "pairs judged": len(judged), "rank of pairs": chosen, "recall": result}


def report(splits: list[dict[str, Any]], sources: list[str]) -> str:
    """Both recalls before and after, mean of the splits, and what that means."""
    fitted, judged = splits[0]["pairs fitted on"], splits[0]["pairs judged"]
    lines = [
        f"{fitted} pairs fitted on, {judged} others judged; random halves: {len(splits)}.",
        f"Each text is searched among {2 * judged - 1} others; 95 % of a bootstrap over pairs in brackets.",
        "",
    ]
    ranks = [split["rank of pairs"] for split in splits]
    lines[1:1] = [f"Directions within pairs, chosen on a quarter of the fitted: {ranks}."] if any(ranks) else []
    first = {}
    for k in KS:
        for what in splits[0]["recall"]:
            numbers = [split["recall"][what][f"recall@{k}"] for split in splits if what in split["recall"]]
            value, low, high = torch.tensor(numbers, dtype=torch.double).mean(0).tolist()
            first.setdefault(what, value)
            lines.append(f"recall@{k:<3} {what:<14} {value:.3f}  [{low:.3f}, {high:.3f}]")
    before, *_, after = first.values()
    return "\n".join([
        *lines,
        "",
        f"In plain words: a text of {sources[0]!r} was to find the one of {sources[1]!r} on the same thing, and back.",
        f"The first hit was right in {before:.0%} of the searches, and in {after:.0%} once the source was erased,",
        "on things that the erasure was not fitted on.",
    ])  # fmt: skip


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[2])
    parser.add_argument("data", nargs="?", help="A CSV with pair, source and text; the catalogue when left out.")
    parser.add_argument("--model", default="embedded", help="An encoder like BERT whose embedding is the tokens' mean.")
    parser.add_argument("--target", default="encoder.layer.5.output.LayerNorm", help="Its last norm.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0], help="Directions within pairs to choose from.")
    parser.add_argument("--splits", type=int, default=1, help="How many random halves.")
    parser.add_argument("--out", type=Path, default=Path("out/two-sources"), help="Where the adapter and results go.")
    given = parser.parse_args()
    rows = load_source(given.data)["train"] if given.data else Dataset.from_list(catalogue())
    rows = rows.cast_column("pair", Value("string"))
    base = embedded_model() if given.model == "embedded" else given.model
    given.out.mkdir(parents=True, exist_ok=True)
    search = Search(rows, base, given.target)
    splits = [search.split(seed, given.ranks, None if seed else given.out) for seed in range(given.splits)]
    (given.out / "search.json").write_text(json.dumps(splits, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{report(splits, search.sources)}\nadapter: {given.out}\n")


if __name__ == "__main__":
    main()
