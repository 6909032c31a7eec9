"""Data of the house: one LightningDataModule a modality, on shared sources and a resumable order."""

from trunkline.datamodules.image import Augmentation, ImageData
from trunkline.datamodules.masked_text import MaskedTextData
from trunkline.datamodules.text import TextData

__all__ = ["Augmentation", "ImageData", "MaskedTextData", "TextData"]
