"""Sharing adapters: model cards, and pushing to the Hub.

`save_pretrained` and `push_to_hub` write the card of an adapter by themselves, of `model.add_adapter` models, of a
`PeftModel`, and of Trainer; `hf-erasure push`, `merge --push` and `export-lora --push` upload a folder in one commit.

A card is Markdown between two comments, made from what the adapter's configuration says. Text outside them, and text
inside that somebody has changed, stays; then only the metadata is brought up to date.
"""

from .cards import WrittenCard, export_to_lora, write_card, write_merged_card
from .describing import describe, describe_folder
from .pushing import PushError, push_adapter, push_model

__all__ = [
    "PushError",
    "WrittenCard",
    "describe",
    "describe_folder",
    "export_to_lora",
    "push_adapter",
    "push_model",
    "write_card",
    "write_merged_card",
]
