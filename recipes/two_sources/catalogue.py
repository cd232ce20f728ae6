"""A catalogue in two house styles, made by this file: 240 articles, each described by a warehouse and by a shop.

Both describe an article's kind, material, size and use; the warehouse lists fields, the shop praises the article.
A search with one text for the other first finds texts in the same style.
"""

from __future__ import annotations

import random

THINGS = {
    "desk lamp": "reading at night", "bread knife": "the kitchen", "garden chair": "the terrace",
    "travel bag": "a weekend away", "wall clock": "the living room", "tea pot": "breakfast",
    "tool box": "the workshop", "picture frame": "family photographs", "fruit bowl": "the dining table",
    "door mat": "the entrance", "candle holder": "winter evenings", "serving tray": "guests",
    "book stand": "the study", "coat rack": "the hall", "flower vase": "tulips", "bird feeder": "the balcony",
    "letter tray": "the office", "bath stool": "the bathroom", "spice jar": "the larder", "bottle rack": "the cellar",
}  # fmt: skip
MATERIALS = ["oak", "brass", "steel", "glass", "bamboo", "leather", "copper", "marble", "wool", "clay", "cork", "linen"]
COLOURS = ["white", "black", "green", "blue", "red", "grey", "yellow", "brown"]
SIZES = [12, 18, 24, 30, 36, 45, 60, 75]
WAREHOUSE = [
    "ART. {n} // {thing} // mat. {material} // col. {colour} // {size} cm // use: {use}. Stock unit 1, pallet 48.",
    "{thing}, {material}, {colour}, {size} cm. Article no. {n}. Intended for {use}. Delivery ex works, VAT excluded.",
    "Item {n}: {thing}; material {material}; colour {colour}; length {size} cm; application {use}. No returns.",
]
SHOP = [
    "You will fall in love with our {colour} {thing}! Lovingly made of {material}, {size} cm of pure joy for {use}.",
    "Treat yourself: this gorgeous {thing} in {colour} {material} ({size} cm) brings a little sunshine to {use}.",
    "Looking for the perfect gift? Our dreamy {colour} {thing} of finest {material}, {size} cm, was made for {use}!",
]


def rows(seed: int = 0) -> list[dict[str, str]]:
    """Rows with `pair`, `source` (`warehouse` or `shop`) and `text`; each pair has one row of each source."""
    rng, found = random.Random(seed), []
    chosen = [(thing, material) for thing in THINGS for material in MATERIALS]
    for number, (thing, material) in enumerate(chosen):
        facts = {"thing": thing, "material": material, "use": THINGS[thing], "n": 40_000 + 37 * number}
        facts |= {"colour": rng.choice(COLOURS), "size": rng.choice(SIZES)}
        for source, templates in (("warehouse", WAREHOUSE), ("shop", SHOP)):
            text = rng.choice(templates).format_map(facts)
            found.append({"pair": str(number), "source": source, "text": text})
    return found
