"""Where recordings come from."""

from trunkline.datamodules.audio.audio_rows import AudioRows
from trunkline.datamodules.hub import NamedSource


def open_audio(source: NamedSource) -> AudioRows:
    """The recordings of a source.

    Raises:
        TrunklineError: if it cannot be read.
    """
    from trunkline.datamodules.audio.spoken_digits import open_spoken_digits

    return open_spoken_digits(source.name)
