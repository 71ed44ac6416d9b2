"""What is wrong with each training, written down before the rules that are to find it.

Causes are those of `lightning_gradguard.forensics.flow`. Rules may be tuned on the first table, the trainings of
`benchmarks.detection`. Those of `benchmarks.diagnosis.trainings` are labelled at their functions. Nothing is wrong with the
healthy ones of `benchmarks.detection`: an alert is forced on them, and the right answer is that there is no cause.
"""

from benchmarks.detection.trainings import KINDS

HEALTHY = tuple(name for name, kind in KINDS.items() if kind.is_healthy)

TUNED_ON = {
    # vanishing
    "deep_sigmoid_sgd": "activation",
    "deep_sigmoid_adam": "activation",
    "bad_init_small": "init",
    "deep_tanh_default": "init",
    "saturating_tanh": "saturation",
    "saturating_sigmoid": "saturation",
    "fp16_underflow": "loss",
    "dead_relu_layer": "dead",
    "dead_relu_later": "dead",
    "detached_branch": "cut",
    "detached_later": "cut",
    "zero_init": "init",
    # exploding
    "lr_jump": "rate",
    "bad_batch": "batch",
    "outlier_label": "sample",
    "data_scale_shift": "batch",
    "weight_corruption": "weights",
    "one_layer_spike": "foreign",
    "one_attention_spike": "foreign",
    "embedding_blowup": "weights",
    "slow_divergence": "rate",
    "range_test_adam": "rate",
    "range_test_sgd": "rate",
    "range_test_transformer": "rate",
    "inverted_decay": "weights",
    "slow_layer_growth": "foreign",
    "exploding_rnn": "recurrence",
    "adam_epsilon": "batch",
    "rate_too_high": "rate",
    "bad_init_large": "init",
    "missing_normalisation": "normalisation",
    "unstable_rnn": "recurrence",
}
