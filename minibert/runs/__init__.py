"""One run, several seeds, a search: folders, records, trackers."""
