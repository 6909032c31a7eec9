"""Speech to text with an encoder-decoder, as Whisper does: the text is written token by token."""

from collections.abc import Sequence
from typing import Any, ClassVar

from trunkline.modules.networks.whisper import Whisper, WhisperConfig
from trunkline.modules.objectives.audio_task import AudioTask
from trunkline.modules.objectives.seq2seq import Seq2Seq


class SpeechToText(AudioTask, Seq2Seq):
    """Cross-entropy of each next token of a transcript, given the clip and the right tokens before it.

    Logged in evaluation: as by `Seq2Seq`, with error rates over the whole split instead of translation's scores: `wer`
    and `cer`, edits of words and characters divided by their number in the transcripts. Texts begin with the start
    tokens that the data names, such as those of language and task.

    Args:
        network: shape of the encoder-decoder.
        scores: `wer`, `cer`, `exact`, or another score of `Seq2Seq`; none of them writes no texts.
        **shared: see `Seq2Seq` and `TrunklineModule`.
    """

    network_class = Whisper
    source_field = "features"
    usual_data = "SpeechData"
    shown: ClassVar[tuple[str, ...]] = ("loss", "wer", "cer")

    def __init__(
        self, network: WhisperConfig | None = None, *, scores: Sequence[str] = ("wer", "cer", "exact"), **shared: Any
    ) -> None:
        super().__init__(network, scores=scores, **shared)  # type: ignore[arg-type]  # it makes a `network_class`
