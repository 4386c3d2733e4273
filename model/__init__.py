"""The model: pictures to features (frozen), features and text to answers."""
