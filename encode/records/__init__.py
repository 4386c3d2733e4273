"""Other people's formats: in, one line or row as keys and values; out, conversations with their media.

    record      the types: `Record`, `MediaName`; read it first
    account     counts what a source used, ignored, left out and refused
    media_files finds the files, URLs and data: URIs that records name

Every key of a record is used, counted in the account, or named in a fault.
"""
