"""Healthy trainings of architectures from `transformers`, tiny, with random weights, on the data of the other trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.trainings.base import Kind, Training
from benchmarks.detection.trainings.data import digits, sampled, sequences, text

STEPS = 400
_VOCABULARY = 100
_MASK, _PAD, _BEGIN, _END = 96, 97, 98, 99
_SPECIAL = {"pad_token_id": _PAD, "bos_token_id": _BEGIN, "eos_token_id": _END}
_WIDTH, _HEADS, _LAYERS, _INNER, _LENGTH = 32, 2, 2, 64, 32
_SIZES = {"hidden_size": _WIDTH, "num_attention_heads": _HEADS, "num_hidden_layers": _LAYERS, "intermediate_size": _INNER}
_ENCODER = {**_SIZES, "vocab_size": _VOCABULARY, "max_position_embeddings": 64, "pad_token_id": _PAD}
_DECODER = {**_SIZES, **_SPECIAL, "vocab_size": _VOCABULARY, "max_position_embeddings": 64}
_GROUPED = {**_DECODER, "num_key_value_heads": 1}
_IMAGES = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}


def _adamw(network: nn.Module, rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)


def _own_loss(network: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = network(**batch).loss
        return found

    return loss


def _training(network: nn.Module, batch: Callable[[int], dict[str, Tensor]]) -> Training:
    return Training(network, _adamw(network), batch, _own_loss(network))


def _masked(network: nn.Module) -> Training:
    """Characters, 15 % of which are to be guessed."""
    source = sequences(text(), 16, _LENGTH)

    def batch(step: int) -> dict[str, Tensor]:
        characters, _ = source(step)
        hidden = torch.rand(characters.shape) < 0.15
        return {"input_ids": characters.masked_fill(hidden, _MASK), "labels": characters.masked_fill(~hidden, -100)}

    return _training(network, batch)


def _causal(network: nn.Module) -> Training:
    """The next character."""
    source = sequences(text(), 16, _LENGTH)

    def batch(step: int) -> dict[str, Tensor]:
        characters, _ = source(step)
        return {"input_ids": characters, "labels": characters}

    return _training(network, batch)


def _translated(network: nn.Module) -> Training:
    """The same characters, backwards."""
    source = sequences(text(), 16, 16)

    def batch(step: int) -> dict[str, Tensor]:
        characters, _ = source(step)
        return {"input_ids": characters, "labels": characters.flip(1)}

    return _training(network, batch)


def _replaced(network: nn.Module) -> Training:
    """Which characters have been replaced."""
    source = sequences(text(), 16, _LENGTH)

    def batch(step: int) -> dict[str, Tensor]:
        characters, _ = source(step)
        other = torch.randint(0, 96, characters.shape)
        replaced = (torch.rand(characters.shape) < 0.15) & (other != characters)
        return {"input_ids": torch.where(replaced, other, characters), "labels": replaced.long()}

    return _training(network, batch)


def _classified(network: nn.Module, size: int = 8) -> Training:
    """Digits, 8 x 8 or enlarged."""
    source = sampled(digits(), 32)

    def batch(step: int) -> dict[str, Tensor]:
        flat, labels = source(step)
        images = flat.view(-1, 1, 8, 8)
        if size != 8:
            images = F.interpolate(images, size=size, mode="bilinear")
        return {"pixel_values": images, "labels": labels}

    return _training(network, batch)


def _forecast(network: nn.Module) -> Training:
    """Noisy waves of different lengths, whose course is to be foretold."""

    def batch(_: int) -> dict[str, Tensor]:
        phase, speed = torch.rand(16, 1, 2) * 6.28, 0.2 + torch.rand(16, 1, 2)
        waves = torch.sin(phase + speed * torch.arange(40.0).view(1, -1, 1)) + 0.1 * torch.randn(16, 40, 2)
        return {"past_values": waves[:, :32], "future_values": waves[:, 32:]}

    return _training(network, batch)


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=_VOCABULARY, d_model=_WIDTH, d_kv=16, d_ff=_INNER, num_layers=_LAYERS, num_heads=_HEADS,
            pad_token_id=_PAD, decoder_start_token_id=_BEGIN, eos_token_id=_END,
        )
    )  # fmt: skip


def _bart() -> nn.Module:
    sides = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in _SIDE.items()}
    config = tf.BartConfig(
        vocab_size=_VOCABULARY,
        d_model=_WIDTH,
        max_position_embeddings=64,
        decoder_start_token_id=_BEGIN,
        **sides,
        **_SPECIAL,
    )
    return tf.BartForConditionalGeneration(config)


_SIDE: dict[str, Any] = {"layers": _LAYERS, "attention_heads": _HEADS, "ffn_dim": _INNER}

_BUILD: dict[str, Callable[[], Training]] = {
    "bert": lambda: _masked(tf.BertForMaskedLM(tf.BertConfig(**_ENCODER))),
    "albert": lambda: _masked(tf.AlbertForMaskedLM(tf.AlbertConfig(**_ENCODER, embedding_size=16))),
    "deberta_v2": lambda: _masked(
        tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]))
    ),
    "electra": lambda: _replaced(tf.ElectraForPreTraining(tf.ElectraConfig(**_ENCODER, embedding_size=16))),
    "gpt2": lambda: _causal(
        tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=_VOCABULARY, n_positions=64, n_embd=_WIDTH, n_layer=_LAYERS, n_head=_HEADS, **_SPECIAL)
        )
    ),
    "llama": lambda: _causal(tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED))),
    "mixtral": lambda: _causal(tf.MixtralForCausalLM(tf.MixtralConfig(**_GROUPED, num_local_experts=4))),
    "mamba": lambda: _causal(
        tf.MambaForCausalLM(
            tf.MambaConfig(vocab_size=_VOCABULARY, hidden_size=_WIDTH, state_size=8, num_hidden_layers=_LAYERS, **_SPECIAL)
        )
    ),
    "t5": lambda: _translated(_t5()),
    "bart": lambda: _translated(_bart()),
    "vit": lambda: _classified(tf.ViTForImageClassification(tf.ViTConfig(**_SIZES, **_IMAGES))),
    "patchtst": lambda: _forecast(
        tf.PatchTSTForPrediction(
            tf.PatchTSTConfig(
                num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, prediction_length=8, d_model=_WIDTH,
                num_attention_heads=_HEADS, num_hidden_layers=_LAYERS, ffn_dim=_INNER,
            )
        )
    ),
}  # fmt: skip

ARCHITECTURES = {name: Kind(name, build) for name, build in _BUILD.items()}
"""By name; each is healthy."""
