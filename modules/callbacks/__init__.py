"""Callbacks: throughput, graceful stops, guards, and reports in TensorBoard."""

from trunkline.modules.callbacks.attention_maps import AttentionMaps
from trunkline.modules.callbacks.classification import ClassificationReport
from trunkline.modules.callbacks.curves import Curves
from trunkline.modules.callbacks.graceful_stop import GracefulStop, LastCheckpoint
from trunkline.modules.callbacks.loss_spikes import LossSpikes
from trunkline.modules.callbacks.progress import Overview, ProgressBar
from trunkline.modules.callbacks.retrieval import RetrievalReport
from trunkline.modules.callbacks.skipped_rows import SkippedRows
from trunkline.modules.callbacks.speech import Transcripts
from trunkline.modules.callbacks.text import AttentionHeads, FilledMasks, TextSamples
from trunkline.modules.callbacks.throughput import Throughput
from trunkline.modules.callbacks.translation import Translations
from trunkline.modules.callbacks.weight_average import WeightAverage

__all__ = [
    "AttentionHeads",
    "AttentionMaps",
    "ClassificationReport",
    "Curves",
    "FilledMasks",
    "GracefulStop",
    "LastCheckpoint",
    "LossSpikes",
    "Overview",
    "ProgressBar",
    "RetrievalReport",
    "SkippedRows",
    "TextSamples",
    "Throughput",
    "Transcripts",
    "Translations",
    "WeightAverage",
]
