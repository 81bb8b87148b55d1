"""Checkpoints on disk: opened (`directory`), and written whole or not at all (`write`)."""
