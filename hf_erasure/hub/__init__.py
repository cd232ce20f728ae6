"""Sharing adapters: model cards, and pushing to the Hub.

`save_pretrained` and `push_to_hub` write the card of an adapter by themselves: for a model with `add_adapter`, for a
`PeftModel`, and in Trainer. `hf-erasure push`, `merge --push` and `export-lora --push` upload a folder in one commit.

A card is Markdown between two comments, made from the adapter's configuration. Text outside the comments is kept. Text
inside that somebody has changed is kept too, and then only the metadata is brought up to date.
"""

from .cards import WrittenCard, export_to_lora, write_card, write_merged_card
from .describing import describe, describe_folder
from .pushing import PushError, push_adapter, push_model

__all__ = [
    "PushError", "WrittenCard", "describe", "describe_folder", "export_to_lora", "push_adapter", "push_model",
    "write_card", "write_merged_card",
]  # fmt: skip
