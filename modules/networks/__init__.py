"""Plain torch networks, each a short composition on the trunk. Needs only torch."""

from trunkline.modules.networks.ast import AST, ASTConfig
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.bert import BERT, BERTConfig
from trunkline.modules.networks.clip import CLIP, CLIPConfig
from trunkline.modules.networks.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from trunkline.modules.networks.gpt import GPT, GPTConfig
from trunkline.modules.networks.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from trunkline.modules.networks.text_head import TextHead, TextHeadConfig
from trunkline.modules.networks.vit import ViT, ViTConfig
from trunkline.modules.networks.whisper import Whisper, WhisperConfig

__all__ = [
    "AST",
    "BERT",
    "CLIP",
    "GPT",
    "ASTConfig",
    "BERTConfig",
    "CLIPConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "GPTConfig",
    "Network",
    "SpeechEncoder",
    "SpeechEncoderConfig",
    "TextHead",
    "TextHeadConfig",
    "ViT",
    "ViTConfig",
    "Whisper",
    "WhisperConfig",
]
