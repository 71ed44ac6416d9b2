"""Who made the NaN or Inf: damage followed from operator to operator."""
