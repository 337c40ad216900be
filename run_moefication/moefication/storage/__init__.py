"""Bytes and folders: files that are whole or absent, and what a folder says of itself. Knows no model."""
