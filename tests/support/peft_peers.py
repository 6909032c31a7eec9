"""Small models of transformers, their adapters of peft, and the calls with which they compare to ours."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from parity import randomise
from torch import Tensor, nn

from trunkline.modules.networks import AST, BERT, GPT, EncoderDecoder, TextHead, ViT, Whisper
from trunkline.modules.networks.base import Network

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SHAPE, "vocab_size": 30, "max_position_embeddings": 12}
IDS = {"bos_token_id": None, "eos_token_id": None}
GPT2 = {"vocab_size": 30, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2, **IDS}
DISTILBERT = {"vocab_size": 30, "max_position_embeddings": 12, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
SIDES = {
    **{"vocab_size": 30, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
BART = {**SIDES, "max_position_embeddings": 12, "forced_eos_token_id": None}
WHISPER = {**SIDES, "num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 12}
SOUND = {
    **SHAPE,
    **{"num_mel_bins": 8, "max_length": 20, "patch_size": 4, "time_stride": 3, "frequency_stride": 4},
    "num_labels": 3,
}
IMAGE = {**SHAPE, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
PEERS: dict[str, tuple[Any, dict[str, Any], type[Network], list[str], list[str]]] = {
    "gpt2": (hf.GPT2LMHeadModel, GPT2, GPT, ["c_attn", "mlp.c_proj"], []),
    "gpt2-untied": (hf.GPT2LMHeadModel, {**GPT2, "tie_word_embeddings": False}, GPT, ["c_attn"], ["lm_head"]),
    "gpt2-body": (hf.GPT2Model, GPT2, GPT, ["c_attn", "c_fc"], []),
    "llama": (hf.LlamaForCausalLM, {**TEXT, **IDS, "num_key_value_heads": 1}, GPT, ["q_proj", "v_proj"], ["lm_head"]),
    "qwen2": (
        hf.Qwen2ForCausalLM,
        {**TEXT, **IDS, "num_key_value_heads": 2, "tie_word_embeddings": True},
        GPT,
        ["k_proj", "up_proj"],
        [],
    ),
    "bert": (hf.BertForMaskedLM, TEXT, BERT, ["query", "value", "output.dense"], []),
    "bert-body": (hf.BertModel, TEXT, BERT, ["query", "intermediate.dense"], ["pooler"]),
    "roberta": (hf.RobertaForMaskedLM, {**TEXT, "pad_token_id": 1}, BERT, ["key"], ["lm_head.dense"]),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        DISTILBERT,
        BERT,
        ["q_lin", "out_lin"],
        ["vocab_transform"],
    ),
    "bert-classes": (
        hf.BertForSequenceClassification,
        {**TEXT, "num_labels": 3},
        TextHead,
        ["query", "value"],
        ["classifier", "pooler.dense"],
    ),
    "roberta-classes": (
        hf.RobertaForSequenceClassification,
        {**TEXT, "pad_token_id": 1, "num_labels": 3},
        TextHead,
        ["key", "output.dense"],
        ["classifier"],
    ),
    "distilbert-classes": (
        hf.DistilBertForSequenceClassification,
        {**DISTILBERT, "num_labels": 3},
        TextHead,
        ["v_lin"],
        ["pre_classifier", "classifier"],
    ),
    "distilbert-tags": (
        hf.DistilBertForTokenClassification,
        {**DISTILBERT, "num_labels": 3},
        TextHead,
        ["q_lin", "out_lin"],
        ["classifier"],
    ),
    "bert-answers": (hf.BertForQuestionAnswering, {**TEXT, "num_labels": 2}, TextHead, ["query"], ["qa_outputs"]),
    "vit": (hf.ViTForImageClassification, IMAGE, ViT, ["q_proj", "v_proj"], ["classifier"]),
    "dinov2-swiglu": (
        hf.Dinov2ForImageClassification,
        {**IMAGE, "mlp_ratio": 2, "use_swiglu_ffn": True},
        ViT,
        ["k_proj", "up_proj"],
        ["classifier"],
    ),
    "t5": (hf.T5ForConditionalGeneration, {**T5, "feed_forward_proj": "gated-gelu"}, EncoderDecoder, ["q", "wi_1"], []),
    "bart": (hf.BartForConditionalGeneration, BART, EncoderDecoder, ["encoder_attn.q_proj", "fc2", "v_proj"], []),
    "bart-body": (hf.BartModel, BART, EncoderDecoder, ["encoder_attn.k_proj", "self_attn.out_proj"], []),
    "marian": (hf.MarianMTModel, BART, EncoderDecoder, ["k_proj", "encoder_attn.out_proj", "fc1"], []),
    "marian-two": (
        hf.MarianMTModel,
        {**BART, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 30},
        EncoderDecoder,
        ["q_proj", "fc2"],
        [],
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        WHISPER,
        Whisper,
        ["q_proj", "encoder_attn.v_proj", "out_proj", "fc1"],
        [],
    ),
    "ast": (hf.ASTForAudioClassification, SOUND, AST, ["q_proj", "o_proj", "fc2"], ["classifier"]),
    "ast-head": (hf.ASTForAudioClassification, SOUND, AST, ["k_proj", "v_proj", "fc1"], ["classifier.dense"]),
    "ast-body": (hf.ASTModel, SOUND, AST, ["attention.v_proj"], []),
}
Outputs = Callable[[Any], Tensor]


@torch.random.fork_rng()
def make_peer(name: str) -> Any:
    torch.manual_seed(0)
    kind, config, *_ = PEERS[name]
    peer = kind(kind.config_class(**config)).eval()
    tables = {p: p.clone() for p in peer.parameters() if not p.requires_grad}  # computed, and not in files of Marian
    randomise(peer, 0.2)
    for p, value in tables.items():
        p.data.copy_(value)
    return peer


def calls(name: str) -> tuple[Outputs, Outputs]:
    """What gives the outputs of theirs, and of ours."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 30, (2, 9), generator=draw)
    if PEERS[name][2] is ViT:
        image = torch.randn(2, 1, 8, 8, generator=draw)
        return lambda peer: peer(image).logits, lambda own: own(image)
    if PEERS[name][2] is AST:
        frames = torch.randn(2, 20, 8, generator=draw)
        theirs = (lambda peer: peer(frames).pooler_output) if name == "ast-body" else lambda peer: peer(frames).logits
        return theirs, lambda own: own(frames)
    if name == "whisper":
        frames = torch.randn(2, 16, 6, generator=draw)
        return lambda peer: peer(frames.mT, decoder_input_ids=tokens).logits, lambda own: own(frames, tokens)
    if PEERS[name][2] is EncoderDecoder:
        texts = torch.randint(3, 30, (2, 7), generator=draw)
        if name == "bart-body":
            states = lambda own: own(tokens, texts, return_logits=False)  # noqa: E731
            return lambda peer: peer(tokens, decoder_input_ids=texts).last_hidden_state, states
        return lambda peer: peer(tokens, decoder_input_ids=texts).logits, lambda own: own(tokens, texts)
    if name.endswith("body"):
        return lambda peer: peer(tokens).last_hidden_state, lambda own: own(tokens, return_logits=False)
    if name == "bert-answers":
        return lambda peer: torch.stack(peer(tokens)[:2], dim=-1), lambda own: own(tokens)
    return lambda peer: peer(tokens).logits, lambda own: own(tokens)


def spread(module: nn.Module, names: tuple[str, ...]) -> None:
    """Random values for the parameters whose names contain one of these."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if any(part in name for part in names):
                p.normal_(0, 0.3)
