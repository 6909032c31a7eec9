"""Data of the house: LightningDataModules by modality and task, on shared sources and a resumable order."""

from trunkline.datamodules.image import Augmentation, ImageData
from trunkline.datamodules.image_text import ImageTextData
from trunkline.datamodules.labelled_text import LabelledTextData
from trunkline.datamodules.masked_text import MaskedTextData
from trunkline.datamodules.squad import SquadData
from trunkline.datamodules.tagged_text import TaggedTextData
from trunkline.datamodules.text import TextData

__all__ = [
    "Augmentation",
    "ImageData",
    "ImageTextData",
    "LabelledTextData",
    "MaskedTextData",
    "SquadData",
    "TaggedTextData",
    "TextData",
]
