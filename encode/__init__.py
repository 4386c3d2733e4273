"""Media in, feature rows out: the only part that runs the vision encoder over a data set."""
