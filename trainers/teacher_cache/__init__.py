"""Teacher outputs on disk: written by one run, read by many."""
