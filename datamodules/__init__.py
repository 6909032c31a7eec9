"""Data of the house: one LightningDataModule a modality, on shared sources and a resumable order."""

from trunkline.datamodules.image import Augmentation, ImageData

__all__ = ["Augmentation", "ImageData"]
