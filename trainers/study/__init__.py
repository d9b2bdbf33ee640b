"""A study: many runs from one config, dealt over shards, gone on with after any stop, and compared in the end."""
