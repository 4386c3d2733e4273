"""Media inside other files: Parquet and Arrow files, tars, and lines of JSON.

    names   a source for each such item, and its bytes; read this first
    rows    the columns of Parquet and Arrow files that contain such bytes
    scan    all other columns of such files, and which rows have media

In come files of other people; out go bytes of media items, or an EmbeddedMediaError. Nothing that a file
states is trusted: sizes are compared with limits before memory is allocated.
"""
