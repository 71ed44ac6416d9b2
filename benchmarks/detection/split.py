"""Which kinds detectors may be tuned on, and which only judge the result. A kind is in one half with all its seeds.

The tuning half holds what detectors were tuned on from the beginning, and what was added later. The opened half was the
first test set: its scores were looked at once, after which detectors were changed again, so it judges no longer. The same
has happened to the first test half, and to the second. The third was written before the last change of a detector.
"""

from __future__ import annotations

TUNING = frozenset({
    # healthy
    "mlp_adam", "conv_sgd", "transformer_warmup", "autoencoder", "finetune_frozen", "large_batch", "summed_loss",
    "heavy_tail", "label_noise", "lr_restarts", "deep_tanh", "multi_task", "converged", "late_start",
    "late_relu", "zero_branches", "zero_kernels",
    "rare_branch", "late_bert", "late_vit", "late_deep_relu", "late_deep_tanh", "late_linear", "late_generalisation",
    # explosions
    "lr_jump", "bad_batch", "data_scale_shift", "one_layer_spike", "slow_divergence", "slow_layer_growth", "rate_too_high",
    "bad_init_large", "range_test_adam", "range_test_sgd", "range_test_transformer", "inverted_decay",
    # NaN, infinity, fp16
    "nan_element", "log_of_zero", "fp16_backward",
    # vanishing
    "deep_sigmoid_sgd", "bad_init_small", "saturating_tanh", "dead_relu_later", "detached_branch", "deep_tanh_digits",
    "zero_init_cancer", "discriminator_wins",
})  # fmt: skip

OPENED = frozenset({
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

TEST = frozenset({
    # healthy
    "gru_text", "late_leaky", "zero_head", "deep_selu", "variational", "contrastive", "dropout_half", "adagrad_words",
    "transformer_restarts", "one_cycle",
    # explosions
    "rate_spike_adam", "kernel_spike", "bad_targets", "range_test_residual", "inverted_decay_text", "rate_too_high_deep",
    "rate_too_high_adam",
    # NaN, infinity, fp16
    "sqrt_of_zero", "fp16_weights",
    # vanishing
    "deep_sigmoid_conv", "deep_tanh_cancer", "dead_kernels_later", "zero_init_regression",
})  # fmt: skip

SECOND = frozenset({
    # healthy
    "rmsprop_digits", "adagrad_digits", "single_samples", "huber_outliers", "frozen_then_trained", "unused_branch",
    "long_warmup",
    # explosions
    "rate_jump_text", "unscaled_inputs", "spike_in_noise", "growth_with_a_flat_loss", "slow_growth_with_a_flat_loss",
    "range_test_gru", "rate_too_high_text", "rate_too_high_residual",
    # NaN, infinity, fp16
    "division_by_zero", "fp16_never_fits",
    # vanishing
    "deep_sigmoid_text", "fp16_underflow_for_good", "dead_block_later",
})  # fmt: skip

THIRD = frozenset({
    # healthy
    "nesterov_conv", "modular_sum", "plain_rnn_text", "distilled", "hinge", "pairs_of_samples", "adadelta_digits",
    "nadam_text", "sign_descent", "penalty_sets_in", "side_branch_never_used",
    # explosions
    "summed_once", "raw_targets", "corrupted_matrix", "range_test_conv", "ascent_autoencoder", "growth_at_a_tiny_rate",
    "rate_too_high_tanh", "rate_too_high_rnn",
    # NaN, infinity, fp16
    "missing_target", "fp16_inputs_too_large",
    # vanishing
    "deep_softsign", "gate_closes", "dead_recurrent_input",
})  # fmt: skip

HALVES = {"tuning": TUNING, "opened": OPENED, "first test": TEST, "second test": SECOND, "third test": THIRD}
SEEDS = (0, 1, 2)
FRESH_SEEDS = (3, 4, 5)
"""Of the healthy kinds only, to count false alarms once more."""
