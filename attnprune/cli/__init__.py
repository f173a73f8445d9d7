"""The command line: options in, one call, a report out."""
