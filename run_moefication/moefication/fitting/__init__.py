"""Closed forms and losses, on tensors alone."""
