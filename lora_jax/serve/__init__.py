"""Many adapters over one base, each request with its own: an engine, and a thread for it."""
