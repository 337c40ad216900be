"""One decoder layer in float32: its attention half, its MLP, the scores of its experts."""
