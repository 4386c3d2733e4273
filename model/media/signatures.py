"""The first bytes of file formats, and what to do with a file in a format that is not decoded here.

Tables of `model.media.kinds`. Formats whose bytes need more than a comparison are recognised there.
"""

from __future__ import annotations

Signature = tuple[int, bytes, str]
"""Offset, the bytes that every file of the format has there, name of the format."""

IMAGES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
)

VIDEOS = (
    (0, b"FLV\x01", "FLV"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c", "ASF"),
    (0, b"YUV4MPEG2 ", "Y4M"),
    (0, b"DKIF\0\0", "IVF"),
    (0, b"nut/multimedia container\0", "NUT"),
    (0, b"\0\0\x01\xba", "MPEG-PS"),
    (0, b"\0\0\x01\xb3", "MPEG video stream"),
    (0, b"\0\0\x01\xb0", "MPEG-4 video stream"),
    (0, b"\0\0\x01\xb5", "MPEG-4 video stream"),
    (0, b"\x1f\x07\x00", "DV"),
    (0, b"\x12\x00\x0a", "AV1 stream"),
)

OTHERS = (
    (0, b"%PDF-", "PDF document"),
    (0, b"%!PS", "PostScript document"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript document"),
    (0, b"8BPS", "Photoshop document"),
    (0, b"8BPB", "Photoshop document"),
    (0, b"gimp xcf", "GIMP document"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"#?RGBE", "Radiance HDR"),
    (0, b"DDS ", "DDS texture"),
    (0, b"qoif", "QOI"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    (0, b"\0\0\x01\0", "ICO icon"),
    (0, b"\0\0\x02\0", "ICO icon"),
    (0, b"icns", "ICNS icon"),
    (0, b"AT&TFORM", "DjVu document"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF drawing"),
    (40, b" EMF\0\0\x01\0", "EMF drawing"),
    (0, b"FUJIFILMCCD-RAW", "camera raw"),
    (0, b"IIRO", "camera raw"),
    (0, b"IIRS", "camera raw"),
    (0, b"MMOR", "camera raw"),
    (0, b"IIU\0", "camera raw"),
    (0, b"FOVb", "camera raw"),
    (0, b"\0MRM", "camera raw"),
    (6, b"HEAPCCDR", "camera raw"),
    (0, b"PK\x03\x04", "ZIP archive"),
    (0, b"PK\x05\x06", "ZIP archive"),
    (0, b"\x1f\x8b", "gzip archive"),
    (0, b"BZh", "bzip2 archive"),
    (0, b"\xfd7zXZ\0", "xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "zstd archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (0, b"Rar!\x1a\x07", "RAR archive"),
    (257, b"ustar", "tar archive"),
    (0, b"PAR1", "Parquet table"),
    (0, b"ARROW1", "Arrow table"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5 file"),
    (0, b"SQLite format 3\0", "SQLite database"),
    (0, b"\0\x05\x16\x07", "AppleDouble file of macOS"),
    (0, b"\0\0\0\x01Bud1", "folder view of macOS"),
    (0, b"ID3", "MP3 sound"),
    (0, b"\xff\xfb", "MP3 sound"),
    (0, b"\xff\xf3", "MP3 sound"),
    (0, b"\xff\xf2", "MP3 sound"),
    (0, b"\xff\xf1", "AAC sound"),
    (0, b"\xff\xf9", "AAC sound"),
    (0, b"fLaC", "FLAC sound"),
    (0, b"#!AMR", "AMR sound"),
    (0, b"MThd", "MIDI sound"),
    (0, b".snd", "AU sound"),
    (0, b".RMF", "RealMedia"),
    (0, b"FWS", "Flash"),
    (0, b"CWS", "Flash"),
    (0, b"ZWS", "Flash"),
)

# fmt: off
PICTURES = (
    "HEIC", "HEIF", "JPEG 2000", "JPEG XL", "JPEG XR", "OpenEXR", "Radiance HDR", "QOI", "FITS", "DICOM",
    "TGA", "SVG", "camera raw",
)
DRAWN = (
    "PDF document", "PostScript document", "DjVu document", "Photoshop document", "GIMP document",
    "WMF drawing", "EMF drawing", "DDS texture", "ICO icon", "ICNS icon",
)
FILMS = ("RealMedia", "Flash")
ARCHIVES = (
    "ZIP archive", "tar archive", "7z archive", "RAR archive", "gzip archive", "bzip2 archive",
    "xz archive", "zstd archive",
)
RAW_SUFFIXES = (
    ".3fr", ".arw", ".cr2", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".nef", ".nrw",
    ".pef", ".raw", ".rwl", ".sr2", ".srf", ".srw",
)
# fmt: on
"""Names of camera raws, which begin as TIFF does."""

ADVICE = {
    **dict.fromkeys((*PICTURES, *DRAWN), "convert it to PNG or JPEG"),
    **dict.fromkeys(FILMS, "convert it to MP4"),
    **dict.fromkeys(ARCHIVES, "unpack it"),
    **dict.fromkeys(("HEIC", "HEIF"), "install its reader: pip install 'nanomolmo2[heic]'"),
    "Git LFS pointer": "fetch the file itself: git lfs pull",
    "git-annex pointer": "fetch the file itself: git annex get",
}
"""Format that is not decoded -> how to make the file usable."""

NAMED_VIDEOS = {
    ".mjpeg": "MJPEG stream",
    ".mjpg": "MJPEG stream",
    ".h263": "H.263 stream",
    ".263": "H.263 stream",
}
"""Suffixes of videos that have no signature of their own: MJPEG begins as a JPEG image does."""
