"""Getting weights: scripts, and the one way in which they (and `llama_data`) fetch pinned files."""
