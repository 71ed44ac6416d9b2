"""Why gradients vanish or explode: norms followed from layer to layer."""
