"""The checkpoint format and everything that reads it: folders, bases, gates, probes, the Hub, comparisons."""
