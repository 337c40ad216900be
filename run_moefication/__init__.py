"""The toolkit that turns a dense LLaMA checkpoint into a LlamaMoE one: one script per stage."""
