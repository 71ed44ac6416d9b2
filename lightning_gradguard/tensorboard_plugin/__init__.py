"""The GradGuard tab of TensorBoard: what a training has written, read back and drawn. Loads neither torch nor lightning."""
