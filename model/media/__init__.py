"""Images and videos from strangers, decoded to RGB pixels. PIL, PyAV and numpy, no torch.

    kinds           the first bytes of a file -> image, video, or what else it is
    signatures      tables of first bytes, and what to do with formats that are not decoded
    png_chunks      the parts of a PNG file that change its pixels
    cut_jpeg        a JPEG file that lacks its last bytes, and how much of it that is
    images          bytes -> an upright RGB image
    fit             an RGB image -> the encoder's square input; how far a JPEG is reduced for it
    video           the frames of a video at given times
    video_open      which containers and codecs are opened, and how
    video_index     the length of a video: one pass over its packets, first and last frame
    video_decoder   packets -> frames, from any key frame on
    video_pixels    one decoded frame -> an upright RGB image with square pixels

Input that cannot be decoded raises BadMediaError with a reason for the ledger, and nothing else.
Read images.py, then video.py.
"""
