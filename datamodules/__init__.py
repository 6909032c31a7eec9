"""LightningDataModules, one for each modality and task; they share sources and a resumable order of samples."""

from trunkline.datamodules.audio.audio_augmentation import AudioAugmentation
from trunkline.datamodules.audio.audio_data import AudioData
from trunkline.datamodules.audio.speech_data import SpeechData
from trunkline.datamodules.images.image_data import ImageData
from trunkline.datamodules.images.preprocessing import Augmentation
from trunkline.datamodules.pairs.image_text_data import ImageTextData
from trunkline.datamodules.text.masked_text import MaskedTextData
from trunkline.datamodules.text.span_corruption import SpanCorruptionData
from trunkline.datamodules.text.text_data import TextData
from trunkline.datamodules.text_tasks.labelled_text import LabelledTextData
from trunkline.datamodules.text_tasks.squad import SquadData
from trunkline.datamodules.text_tasks.tagged_text import TaggedTextData
from trunkline.datamodules.translation.translation_data import TranslationData

__all__ = [
    "AudioAugmentation",
    "AudioData",
    "Augmentation",
    "ImageData",
    "ImageTextData",
    "LabelledTextData",
    "MaskedTextData",
    "SpanCorruptionData",
    "SpeechData",
    "SquadData",
    "TaggedTextData",
    "TextData",
    "TranslationData",
]
