"""Images and videos from strangers, decoded to RGB pixels. PIL, PyAV and numpy, no torch.

    images          bytes -> an upright RGB image -> the encoder's square input
    video           a video's length and its frames at given times
    video_open      which containers and codecs are opened, and how
    video_index     one pass over a video: packets, first and last frame
    video_decoder   packets -> frames, from any key frame on
    video_pixels    one decoded frame -> an upright RGB image with square pixels

Whatever cannot be decoded raises BadMediaError with a reason for the ledger, and nothing else.
Read images.py, then video.py.
"""
