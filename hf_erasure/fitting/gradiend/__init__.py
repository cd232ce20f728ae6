"""GRADIEND on a model: counterfactual pairs and neutral texts, gradients, training, and the choice of an edit."""

from hf_erasure.models.heads import task_of
from hf_erasure.models.neutral import LanguageModelling, neutral_batches
from hf_erasure.models.slots import PairBatch, SlotReader
from hf_erasure.models.word_tokens import SLOT, PairError, word_tokens

from .adapter import GradiendAdapter
from .comparing import FeatureComparison, compare_features
from .gradients import EncodedValues, GradientReader
from .pairs import PairSet, pair_batches
from .selection import Selection
from .sentences import pairs_from_sentences, pairs_from_templates
from .trainer import GradiendTrainer
from .training import GradiendTrainingArguments

__all__ = [
    "SLOT",
    "EncodedValues",
    "FeatureComparison",
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
    "compare_features",
    "neutral_batches",
    "pair_batches",
    "pairs_from_sentences",
    "pairs_from_templates",
    "task_of",
    "word_tokens",
]
