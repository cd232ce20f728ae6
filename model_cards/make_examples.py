"""Fill one example of a card for each type of adapter, from what `make demo` fits.

    make demo && python model_cards/make_examples.py

Each folder in `model_cards/examples` gets the card, its pictures, and `facts.json`: what the card says, as plain data.
After a change of a template, `python model_cards/make_examples.py --render` fills the examples with the same facts.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

from hf_erasure.hub.cards import Card, config_in, gather_facts, rendered
from hf_erasure.hub.facts import CardFacts

ROOT = Path(__file__).parents[1]
EXAMPLES = Path(__file__).parent / "examples"
COMMAND = "make demo && python model_cards/make_examples.py"
# Type of adapter → the folder that the demo writes, and what the base is called on the Hub, where it is there.
DEMOS = {
    "concept_erasure": (ROOT / "out/minilm-gender", "sentence-transformers/all-MiniLM-L6-v2"),
    "gradiend": (ROOT / "out/gradiend-demo/adapter", None),
}


def example(facts: CardFacts) -> str:
    """The text of an example: a card with a line on where it comes from."""
    card: Card = rendered(facts)
    note = f"<!-- An example, filled by `{COMMAND}`. The repository it names does not exist. -->"
    return f"---\n{card.data.to_yaml()}\n---\n\n{note}\n\n{card.block}\n"


def read(folder: Path) -> CardFacts:
    """The facts of an example that is there."""
    return CardFacts(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))


def make(kind: str) -> None:
    """Take the facts and the pictures from what the demo has written."""
    made, base = DEMOS[kind]
    config = config_in(made)
    if config is None:
        raise SystemExit(f"{made} holds no adapter: run `make demo` first.")
    config.base_model_name_or_path = base
    facts = replace(gather_facts(made, config), repo_id=f"your-name/{kind.replace('_', '-')}")
    folder = EXAMPLES / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in facts.pictures:
        shutil.copyfile(made / name, folder / name)
    text = json.dumps(asdict(facts), indent=1, ensure_ascii=False)
    (folder / "facts.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Make the examples, or only fill them again."""
    for kind in DEMOS:
        if "--render" not in sys.argv[1:]:
            make(kind)
        folder = EXAMPLES / kind
        (folder / "README.md").write_text(example(read(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
