"""Healthy trainings that stay on a plateau for long, and whose gradients grow many times when they leave it."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor, nn

from benchmarks.detection.trainings.base import Training, healthy
from benchmarks.detection.trainings.data import Batch, diabetes, digits, sampled
from benchmarks.detection.trainings.networks import adam, cross_entropy, linears, mlp, sgd, squared_error


class _Classifier(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.body(inputs).logits
        return logits


_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 10}


@healthy
def late_bert() -> Training:
    """A tiny BERT that reads a digit pixel by pixel."""
    config = tf.BertConfig(vocab_size=17, max_position_embeddings=64, pad_token_id=None, **_TINY)
    network = _Classifier(tf.BertForSequenceClassification(config))
    inputs, labels = digits()
    data = ((inputs * 16).long(), labels)
    return Training(network, adam(network, 1e-3), sampled(data, 32), cross_entropy(network))


@healthy
def late_vit() -> Training:
    """A tiny ViT with a rate so small that it dwells."""
    network = _Classifier(tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=2, num_channels=1, **_TINY)))
    inputs, labels = digits()
    return Training(network, adam(network, 3e-4), sampled((inputs.view(-1, 1, 8, 8), labels), 32), cross_entropy(network))


@healthy
def late_deep_relu() -> Training:
    """Eleven plain layers at a small rate."""
    network = mlp([64] * 11 + [10])
    return Training(network, torch.optim.Adam(network.parameters(), 5e-4), sampled(digits(), 32), cross_entropy(network))


@healthy
def late_deep_tanh() -> Training:
    """Small weights and plain gradient descent: the gradient grows exponentially away from the saddle."""
    network = mlp([64] + [48] * 5 + [10], nn.Tanh)
    for layer in linears(network):
        layer.weight.data *= 0.8
    return Training(network, sgd(network, 0.1), sampled(digits(), 64), cross_entropy(network))


@healthy
def late_linear() -> Training:
    """Six linear layers with small weights, on all data at once: the plateaus of Saxe, McClelland, Ganguli, 2014."""
    network = mlp([10] + [32] * 5 + [1], nn.Identity)
    for layer in linears(network):
        layer.weight.data *= 0.45
        layer.bias.data.zero_()
    return Training(network, sgd(network, 0.1), lambda _: diabetes(), squared_error(network))


@healthy
def late_generalisation() -> Training:
    """Addition modulo 23 with strong weight decay: it learns by heart first, and the rule later (Power et al., 2022)."""
    size = 23
    network = nn.Sequential(nn.Embedding(2 * size, 32), nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, size))
    first, second = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pairs = torch.stack([first.flatten(), second.flatten() + size], dim=1)
    data: Batch = (pairs, (first + second).flatten() % size)
    chosen = torch.randperm(len(pairs))[: len(pairs) // 2]
    batch = (data[0][chosen], data[1][chosen])
    return Training(network, adam(network, 3e-3, weight_decay=1.0), lambda _: batch, cross_entropy(network))
