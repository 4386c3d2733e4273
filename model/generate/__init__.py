"""Ask a trained model about images and videos that are in no cache: `python -m model.generate`."""
