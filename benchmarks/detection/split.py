"""Which kinds detectors may be tuned on, and which only judge the result.

Fixed before any detector was run on these trainings. A kind is in one half with all its seeds. The test half's scores were
looked at after the last change of a detector. Kinds that were added to the tuning half since then: `late_relu`, which
raised false alarms in use.
"""

from __future__ import annotations

TUNING = frozenset({
    # healthy
    "mlp_adam", "conv_sgd", "transformer_warmup", "autoencoder", "finetune_frozen", "large_batch", "summed_loss",
    "heavy_tail", "label_noise", "lr_restarts", "deep_tanh", "multi_task", "converged", "late_start", "late_relu",
    # explosions
    "lr_jump", "bad_batch", "data_scale_shift", "one_layer_spike", "slow_divergence", "slow_layer_growth", "rate_too_high",
    "bad_init_large", "range_test_adam", "range_test_sgd", "range_test_transformer", "inverted_decay",
    # NaN, infinity, fp16
    "nan_element", "log_of_zero", "fp16_backward",
    # vanishing
    "deep_sigmoid_sgd", "bad_init_small", "saturating_tanh", "dead_relu_later", "detached_branch",
})  # fmt: skip

TEST = frozenset({
    # healthy
    "mlp_momentum", "conv_residual", "residual_adamw", "lstm_text", "transformer_cosine", "gan", "small_batch", "high_rate",
    "mixed_precision", "curriculum", "embedding_sparse", "policy_gradient", "mixture_of_experts", "rare_class",
    # explosions
    "outlier_label", "weight_corruption", "one_attention_spike", "embedding_blowup", "exploding_rnn", "adam_epsilon",
    "missing_normalisation", "unstable_rnn",
    # NaN, infinity, fp16
    "inf_element", "nan_input", "fp16_forward",
    # vanishing
    "deep_sigmoid_adam", "deep_tanh_default", "saturating_sigmoid", "fp16_underflow", "dead_relu_layer", "detached_later",
    "zero_init",
})  # fmt: skip

HALVES = {"tuning": TUNING, "test": TEST}
SEEDS = (0, 1, 2)
FRESH_SEEDS = (3, 4, 5)
"""Of the healthy kinds only, to count false alarms once more."""
