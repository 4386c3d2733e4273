"""What several tests use: spaces, caches, servers, faults, images and videos. No test imports a test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository, where commands under test start."""
