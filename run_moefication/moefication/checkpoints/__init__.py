"""Model folders: dense LLaMA and LlamaMoE checkpoints read tensor by tensor, and new ones written."""
