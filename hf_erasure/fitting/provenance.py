"""Where the data of a fit come from, as far as a data set knows it itself: what the card of the adapter says of it."""

from __future__ import annotations

import re
from typing import Any

# The part of an adapter's provenance in which a callback writes what it measured while the model was trained.
TRAINING = "training"
# The part that says which results of a recipe, in the file beside the adapter, are its own: their digest.
RECIPE = "recipe"
_ON_THE_HUB = re.compile(r"hf://datasets/([^@\s]+)@")


def origin_of(dataset: Any, columns: str) -> dict[str, Any]:
    """Names on the Hub, and where the labels are.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`; a data set that was made in memory or read from a file has
            no name.
        columns: What of it is the label, in words.

    Returns:
        `{"datasets", "labels_from"}`, for JSON.
    """
    info = getattr(dataset, "info", None)
    # A data set keeps of its builder which files it has read, and these are named by repository.
    files = getattr(info, "download_checksums", None) or {}
    names = sorted({found[1] for found in map(_ON_THE_HUB.match, map(str, files)) if found})
    split = f", split {str(dataset.split)!r}" if getattr(dataset, "split", None) is not None else ""
    return {"datasets": names, "labels_from": f"{columns} of {' and '.join(names) or 'a data set of its maker'}{split}"}


def origin_of_batches(batches: Any) -> dict[str, Any]:
    """What a loader of `concept_dataloader` knows of its data; empty for other batches."""
    return dict(getattr(getattr(batches, "collate_fn", None), "origin", {}))
