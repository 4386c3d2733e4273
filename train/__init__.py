"""The light trainer: cached features and text in, checkpoints out. Never loads a vision encoder."""
