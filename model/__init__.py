"""The model: images to features (frozen), features and text to answers."""
