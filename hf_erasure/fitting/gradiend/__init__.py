"""GRADIEND on a model: counterfactual pairs and neutral texts, gradients, training, and the choice of an edit."""

from .adapter import GradiendAdapter
from .arguments import GradiendTrainingArguments
from .batches import Filled, PairBatch, Task
from .evaluation import EncodedValues
from .forwards import SlotReader, task_of
from .gradients import GradientReader
from .language import LanguageModelling
from .neutral import neutral_batches
from .pairs import PairSet, check_pairs, pair_batches
from .selection import Selection
from .templates import pairs_from_templates
from .trainer import GradiendTrainer
from .words import SLOT, PairError, pairs_from_sentences, word_tokens

__all__ = [
    "SLOT",
    "EncodedValues",
    "Filled",
    "GradiendAdapter",
    "GradiendTrainer",
    "GradiendTrainingArguments",
    "GradientReader",
    "LanguageModelling",
    "PairBatch",
    "PairError",
    "PairSet",
    "Selection",
    "SlotReader",
    "Task",
    "check_pairs",
    "neutral_batches",
    "pair_batches",
    "pairs_from_sentences",
    "pairs_from_templates",
    "task_of",
    "word_tokens",
]
