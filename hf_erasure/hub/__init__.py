"""Sharing adapters: model cards, and pushing to the Hub.

Public here:

- `write_card(folder, ...)` makes or updates the README.md of an adapter's folder. `save_pretrained` and `push_to_hub`
  call it by themselves, of `model.add_adapter` models, of a `PeftModel`, and of Trainer.
- `describe(model, adapter_name, ...)` adds to an adapter what only its maker knows: data sets, who labelled them, the
  licence. `describe_folder(folder, ...)` does so for a saved one, and takes in what `hf-erasure evaluate` measured.
- `push_adapter(folder, repo_id, ...)` and `push_model(folder, repo_id, ...)` upload a folder in one commit: what
  `hf-erasure push`, `merge --push` and `export-lora --push` call. Both return huggingface_hub's `CommitInfo`.
- `write_merged_card(folder, model, adapter, what)` makes the card of a merged checkpoint.
- `export_to_lora(model, adapter_name, folder)` is that of `hf_erasure.adapters`, and leaves a card too.

A card is Markdown between two comments, made from what the adapter's configuration says. Text outside them, and text
inside that somebody has changed, stays; then only the metadata is brought up to date.
"""

from .cards import WrittenCard, export_to_lora, write_card, write_lora_card, write_merged_card
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
    "write_lora_card",
    "write_merged_card",
]
