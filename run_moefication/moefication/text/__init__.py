"""Files of text to blocks of tokens."""
