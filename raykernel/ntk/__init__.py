"""The empirical neural tangent kernel, per layer group, exactly."""
